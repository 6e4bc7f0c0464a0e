// A key clicks what carries it in data-key: of several, the first whose question is still unanswered.
addEventListener("keydown", (event) => {
  const at = event.target instanceof Element ? event.target : document.body;
  if (event.key === "Escape") at.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || at.matches("textarea, select, input:not([type=radio])")) return;
  if (event.key === "Enter" && at.matches("a, button, summary")) return;
  const all = [...document.querySelectorAll(`[data-key="${CSS.escape(event.key)}"]`)];
  const found = all.find((one) => !one.closest("fieldset:has(:checked)")) ?? all.at(-1);
  if (!found) return;
  event.preventDefault();
  found.click();
  found.closest("details[open]")?.querySelector("textarea, input:not([type=hidden])")?.focus();
});
// The second of two quick presses or clicks would judge an item that nobody has read.
const item = () => document.querySelector("#judgement [name=assignment]")?.value;
let shown = item();
let fresh = 0;
addEventListener("click", (event) => {
  if (!(event.target instanceof Element) || !event.target.closest(".final")) return;
  if (event.detail > 1 || event.timeStamp < fresh) {
    event.preventDefault();
    event.stopPropagation();
  }
}, true);
addEventListener("htmx:afterSwap", () => {
  if (item() !== shown) fresh = performance.now() + 300;
  shown = item();
});
// What is sent to a server that is away is not lost in silence.
const offline = (hidden) => () => (document.getElementById("offline").hidden = hidden);
for (const name of ["htmx:sendError", "htmx:timeout"]) addEventListener(name, offline(false));
addEventListener("htmx:afterSwap", offline(true));
