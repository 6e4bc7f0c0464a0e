"""The floors of the house: who may import whom, where imports stand, what a room's `__init__` holds."""

import ast
from pathlib import Path

import pytest

NAME = "palm_rlhf_pytorch"
PACKAGE = Path(__file__).parents[1] / NAME
# optional extras may be imported where they are used
EXTRAS = {
    "transformers",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "wandb",
    "tensorboard",
    "matplotlib",
    "shtab",
    "django",
    "django_htmx",
    "psycopg",
    "waitress",
    "whitenoise",
    "jinja2",
}
# so may what takes long to import, and is for few or for later
LATE = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.device_mesh", "beartype")
# floor, room, files; a file imports from lower floors, and inside its own room from the files before it
TREE = [
    (-1, "", "extras"),
    (-1, "", "typecheck"),
    (-1, "", "heap"),
    (-2, "", "processor"),
    (-1, "", "products"),
    (-1, "", "tensors"),
    (-1, "", "truncation"),
    (0, "", "logprobs"),
    (0.5, "", "exact_kl"),
    (0, "", "rotary"),
    (0, "", "attention"),
    (0, "", "lora"),
    (1, "text", "tokenizer streaming stops dialogues hf_tokenizer chats records columns rows datasets pydocs"),
    (1, "objectives", "language advantage policy_gradient group preference direct"),
    (
        1,
        "training",
        "optimizer optimizers atomic foreign_file digests tensor_file tensor_reader optimizer_state manifest folder "
        "tensor_stream checkpoint metrics ranks stopping random_states trackers saves best curves charts plots page "
        "runs_page supervised",
    ),
    (1.5, "text", "tokenizer_files"),
    (1.5, "text", "sources corpus excerpts demonstrations packing"),
    (
        2,
        "palm",
        "inputs native sampling responses graphs generation config pretrained scopes text_generation copying hub files "
        "block rows decoding native_decoding transformer text_training pretraining finetuning",
    ),
    (
        3,
        "reward",
        "settings texts files saving model functions weighted expression verifiable classifier http caching labels "
        "learning ensemble asking agreement figures report assessment rules constitution",
    ),
    (
        4,
        "policy",
        "prompts settings ppo_settings pretraining arguments actor_critic critic_start sharding rollout targets "
        "progress losses judging scores answers records rollout_file experience learning diagnostics groups doctor "
        "watch samples inspection run group_settings probe premises identities judge_checks preflight footprint "
        "pieces plan trainer_record trainer_state rollback loop trainer online ppo grpo direct_settings direct_data "
        "direct_records direct_model direct_steps direct_checks direct dpo kto kept best_of_n rejection comparison "
        "rollout_page evaluation",
    ),
    (
        4,
        "feedback",
        "codes environment begin apps settings security formats records sampling models migrations.0001_initial events "
        "claims judgements accounts imports exports agreement gold statistics rounds checks drafts "
        "templatetags.palm_feedback charts pictures errors live judging views urls site wsgi server",
    ),
    (
        5,
        "cli",
        "device config completion outcomes models trackers generate chat_session chat text_runs pretrain finetune "
        "reward_ask reward runs ppo check plan grpo dpo evaluate convert inspect plot demo_text demo_report "
        "demo_pairs demo feedback_data feedback_loop feedback main",
    ),
    (5, "", "ppo"),
    (5, "", "__init__"),
    (6, "", "__main__"),
]
# a room that needs an extra: its files are imported where they are used, and by one command
LAZY = {"feedback": "cli.feedback"}
PLACES = {
    f"{room}.{file}".strip("."): (floor, room, order)
    for floor, room, files in TREE
    for order, file in enumerate(files.split())
}


def imported_files(node, root):
    """Modules of the package that an import names; an empty name for the package itself and for relative imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        return [""]
    else:
        base = node.module.replace(".", "/").replace(NAME, str(root), 1)
        names = [f"{node.module}.{alias.name}" if Path(base).is_dir() else node.module for alias in node.names]
    return sorted({name.removeprefix(NAME).strip(".") for name in names if name.split(".")[0] == NAME})


def may_import(importer, imported):
    if importer not in PLACES or imported not in PLACES:
        return importer not in PLACES  # said once, of the file
    (floor, room, order), (low_floor, low_room, low_order) = PLACES[importer], PLACES[imported]
    return low_floor < floor or (room != "" and room == low_room and low_order < order)


def violations(root):
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        is_room = module.endswith(".__init__")
        if not is_room and module not in PLACES:
            yield f"{module}: not in the tree of tests/test_layers.py; add it where it belongs"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstring = isinstance(tree.body[0], ast.Expr) if tree.body else False
        body = tree.body[1:] if docstring else tree.body
        count = next((i for i, node in enumerate(body) if not isinstance(node, ast.Import | ast.ImportFrom)), len(body))
        top = body[:count]
        for node in body:  # the front door opens late: type checkers alone see all behind it
            if module == "__init__" and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                top = [*top, *node.body]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            where = f"{module}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
            outside = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            lazy = [name for name in imported_files(node, root) if name.split(".")[0] in LAZY]
            late = lazy or outside.split(".")[0] in EXTRAS or outside in LATE
            if node not in top and not late:
                yield f"{where}: not at the top of the file"
            for name in lazy:
                room = name.split(".")[0]
                if not module.startswith((f"{room}.", LAZY[room])) or node in top and module.startswith(LAZY[room]):
                    yield f"{where}: {room} is imported by {LAZY[room]} alone, and where it is used"
            for name in imported_files(node, root):
                room = module.removesuffix("__init__")
                if not (name.startswith(room) and name in PLACES if is_room else may_import(module, name)):
                    yield f"{where}: {name or 'the package'!r} is no file below it"
        exported = [target for node in body[count:] if isinstance(node, ast.Assign) for target in node.targets]
        names = {ast.unparse(target) for target in exported}
        only_exports = len(exported) == len(body[count:]) and names <= {"__all__", "__version__"}
        if path.name == "__init__.py" and module != "__init__" and not only_exports:
            yield f"{module}: holds more than imports and __all__"


def test_every_file_imports_from_below_and_at_its_top():
    found = list(violations(PACKAGE))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("text/tokenizer.py", "from palm_rlhf_pytorch.palm.transformer import PaLM", "no file below"),
        ("text/tokenizer.py", "from palm_rlhf_pytorch.objectives import language", "no file below"),
        ("palm/sampling.py", "import palm_rlhf_pytorch.palm.generation", "no file below"),
        ("policy/ppo.py", "from palm_rlhf_pytorch.palm import PaLM", "no file below"),
        ("policy/ppo.py", "from palm_rlhf_pytorch import PaLM", "no file below"),
        ("policy/ppo.py", "from .rollout import Rollout", "'the package' is no file"),
        ("policy/ppo.py", "def late():\n    import json", "not at the top"),
        ("policy/ppo.py", "VALUE = 1\nimport json", "not at the top"),
        ("palm/__init__.py", "from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer", "no file below"),
        ("cli/ppo.py", "def late():\n    from palm_rlhf_pytorch.feedback.models import Item", "alone"),
        ("cli/feedback.py", "from palm_rlhf_pytorch.feedback.models import Item", "where it is used"),
        ("palm/__init__.py", "def more():\n    return 1", "more than imports"),
        ("palm/helpers.py", "VALUE = 1", "not in the tree"),
    ],
)
def test_checker_finds_a_violation(tmp_path, file, source, message):
    root = tmp_path / NAME
    for name in (file, "palm/transformer.py", "palm/__init__.py", "objectives/language.py", "policy/rollout.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source if name == file else "")
    found = list(violations(root))
    assert len(found) == 1 and message in found[0]
