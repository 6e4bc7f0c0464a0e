"""The models compared, of one shape with random weights; and the gate that ours must pass before it is timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch import ActorCritic, PaLM
from palm_rlhf_pytorch.palm.decoding import STEPS_WORTH_PACKING
from tests.benchmarks.counts import Shape

# Log-probabilities of cached and uncached passes. 1e-5 is rounding in float32; bfloat16 keeps 8 bits, and two orders of
# the same sums over a dozen layers were seen to differ by 0.01 nats.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def our_model(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> PaLM:
    """This library's, in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):
        palm = PaLM(
            num_tokens=shape.num_tokens, dim=shape.dim, depth=shape.depth, heads=shape.heads, dim_head=shape.dim_head,
            ff_mult=shape.ff_mult,
        )  # fmt: skip
    return palm.to(dtype).eval()


def hugging_face() -> Any:
    """The package transformers, quiet.

    Raises:
        SystemExit: if it is missing; the message names the extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise SystemExit('transformers is missing: pip install -e ".[bench]" brings the peers of benchmarks') from error
    transformers.logging.set_verbosity_error()
    return transformers


def llama(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Any:
    """LlamaForCausalLM with as many parameters: one key/value head, tied embedding, the same widths."""
    transformers = hugging_face()
    config = transformers.LlamaConfig(
        vocab_size=shape.num_tokens, hidden_size=shape.dim, intermediate_size=shape.ff_mult * shape.dim,
        num_hidden_layers=shape.depth, num_attention_heads=shape.heads, num_key_value_heads=1,
        head_dim=shape.dim_head, tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(dtype).eval()


def llama_generate(
    model: Any, prompts: Tensor, *, new_tokens: int, static: bool = False, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """New tokens (b, t), sampled from all tokens as ours are; by a cache that grows, or a static one."""
    found = model.generate(
        prompts, attention_mask=torch.ones_like(prompts) if mask is None else mask.long(), max_new_tokens=new_tokens,
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
        **({"cache_implementation": "static"} if static else {}), **options,
    )  # fmt: skip
    return found[:, prompts.shape[1] :]


@torch.no_grad()
def make_endable(weight: Tensor, hidden: Callable[[Tensor], Tensor], *, eos_token: int, mean_length: int) -> None:
    """Change a random model's embedding so that eos_token comes after mean_length tokens, on average.

    All tokens get a component in common, so that hidden states lean to one side, h; it shifts all logits alike. The
    embedding of eos_token becomes a multiple of h, found by bisection: its logit is then high nearly everywhere.

    Args:
        weight: of the embedding and the read-out, (v, d).
        hidden: final hidden states (b, n, d) of tokens (b, n).
        eos_token: the id.
        mean_length: 1 / its probability.
    """
    common = torch.nn.functional.normalize(torch.randn_like(weight[0]), dim=0) * 3 * weight[0].norm()
    weight += common
    states = hidden(torch.randint(0, len(weight), (4, 64), device=weight.device)).flatten(0, 1).float()
    others = (states @ weight.float().T).logsumexp(dim=-1)
    side = states.mean(dim=0)
    low, high = 0.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        likely = (middle * (states @ side) - others).sigmoid().mean()
        low, high = (low, middle) if likely > 1 / mean_length else (middle, high)
    weight[eos_token] = (high * side).to(weight.dtype)


def fill_adapter(palm: PaLM, scope: str) -> None:
    """Give a new scope's update a size: an untrained one adds nothing, and might be left out."""
    for parameter in palm.finetune_parameters(scope):
        nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def check_decoding(palm: PaLM) -> None:
    """The gate: cached decoding is the uncached forward pass, for prompts of three lengths.

    Greedy tokens are those of the uncached pass, exactly in float32, and else up to ties within the tolerance; and
    the log-probabilities of the sampler, of `observe` and of the uncached pass agree.

    Raises:
        SystemExit: if they do not; what differs is named.
    """
    tolerance = TOLERANCES[palm.token_emb.weight.dtype]
    lengths, longest, new = (7, 33, 20), 33, STEPS_WORTH_PACKING + 4
    prompts = torch.randint(1, palm.num_tokens, (len(lengths), longest), device=palm.device)
    mask = torch.arange(longest, device=palm.device) < torch.tensor(lengths, device=palm.device)[:, None]
    prompts = prompts.masked_fill(~mask, 0)
    greedy = palm.generate(longest + new, prompts, prompt_mask=mask, max_new_tokens=new, temperature=0.0)
    _check_scope(palm, prompts[1], new)
    actor_critic = ActorCritic(palm).eval()
    sampled = actor_critic.generate(prompts, mask, max_new_tokens=new)
    for row, length in enumerate(lengths):
        prompt = prompts[row, :length]
        uncached = _uncached_logprobs(palm, prompt, greedy[row])
        best, chosen = uncached.max(dim=-1), uncached.gather(-1, greedy[row, :, None])[:, 0]
        exact = palm.token_emb.weight.dtype == torch.float32
        if not torch.equal(best.indices, greedy[row]) if exact else bool((best.values - chosen > tolerance).any()):
            raise SystemExit(f"gate: greedy tokens {greedy[row].tolist()}, uncached {best.indices.tolist()}")
        drawn = sampled.tokens[row]
        uncached = _uncached_logprobs(palm, prompt, drawn).gather(-1, drawn[:, None])[:, 0]
        sequence = torch.cat((prompt, drawn))[None]
        seen = actor_critic.observe(sequence, torch.tensor([length], device=palm.device), new)
        for name, found in (("the sampler", sampled.logprobs[row]), ("observe", seen.logprobs[0])):
            apart = float((found - uncached).abs().max())
            if not apart <= tolerance:
                raise SystemExit(f"gate: log-probabilities of {name} differ by {apart:.2g}, tolerance {tolerance}")


def _check_scope(palm: PaLM, prompt: Tensor, new: int) -> None:
    """The same of greedy tokens under an adapter that counts."""
    palm.add_finetune_params("gate")
    fill_adapter(palm, "gate")
    tokens = palm.generate(len(prompt) + new, prompt, temperature=0.0, finetune_scope="gate")
    uncached = _uncached_logprobs(palm, prompt, tokens, finetune_scope="gate")
    palm.remove_finetune_params("gate")
    behind = uncached.amax(dim=-1) - uncached.gather(-1, tokens[:, None])[:, 0]
    if not float(behind.max()) <= TOLERANCES[palm.token_emb.weight.dtype]:
        raise SystemExit(f"gate: under an adapter, greedy tokens are {float(behind.max()):.2g} nats off the best")


def _uncached_logprobs(palm: PaLM, prompt: Tensor, response: Tensor, **scope: str) -> Tensor:
    """Log-probabilities (t, v) where each response token is predicted, by one pass over the whole text."""
    logits = palm(torch.cat((prompt, response))[None], **scope)[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1)
