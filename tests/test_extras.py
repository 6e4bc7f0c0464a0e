"""What is said where an optional package is missing: one sentence, quoted for a shell, of an extra that there is."""

import ast
import shlex
from pathlib import Path

from palm_rlhf_pytorch.extras import needs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "palm_rlhf_pytorch"


def test_the_sentence_holds_a_command_that_a_shell_takes_as_it_stands():
    said = needs("a plot", "matplotlib", extra="plot")
    assert said == 'a plot needs matplotlib: pip install "palm-rlhf-pytorch[plot]"'
    assert shlex.split(said.partition(": ")[2]) == ["pip", "install", "palm-rlhf-pytorch[plot]"]
    assert needs("log_with='aim'", "aim", extra=None) == "log_with='aim' needs aim: pip install \"aim\""


def test_all_extras_that_are_named_exist_and_no_file_words_the_sentence_itself():
    call = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body[-1].value
    (extras,) = (keyword.value for keyword in call.keywords if keyword.arg == "extras_require")
    existing, named = {key.value for key in extras.keys}, set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert path.name == "extras.py" or "pip install" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "needs":
                named |= {k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    assert named == existing - {"test", "bench", "wandb", "tensorboard"}  # the last two by the tracker's name
