"""Metadata of the package; tool settings and the build backend are in pyproject.toml."""

import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

README = Path(__file__).parent / "README.md"

FEEDBACK = ["django>=5.2,<7", "django-htmx>=1.28,<2", "whitenoise>=6.9", "waitress>=3"]

# What decoding on a CPU takes at each step, once for each instruction set; palm/native.py picks one, or does without.
# -fopenmp is for the compiler alone: the runtime is the one that torch has loaded.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# What is compiled carries a mark of what it is compiled from: left over from other sources it is not used.
PALM = Path(__file__).parent / "palm_rlhf_pytorch" / "palm"
SOURCES = ("vectors.h", "products.h", "step.c", "draw.c", "native.py")
MARK = zlib.crc32(b"".join((PALM / file).read_bytes() for file in SOURCES))
BUILDS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

setup(
    name="palm-rlhf-pytorch",
    version="0.1.0",
    description=(
        "RLHF (PPO) on a PaLM language model, in PyTorch. The name on PyPI belongs to the original project:"
        " install this one from its repository."
    ),
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["palm_rlhf_pytorch*"]),
    package_data={
        "palm_rlhf_pytorch": ["py.typed"],
        "palm_rlhf_pytorch.palm": ["*.c", "*.h"],
        "palm_rlhf_pytorch.feedback": ["templates/**/*", "static/**/*"],
    },
    ext_modules=[
        Extension(
            f"palm_rlhf_pytorch.palm._native_{name}",
            [f"palm_rlhf_pytorch/palm/{file}.c" for file in ("step", "draw")],
            depends=[f"palm_rlhf_pytorch/palm/{file}" for file in SOURCES],
            libraries=["m"],
            define_macros=[("SOURCES", f"{MARK}u")],
            extra_compile_args=["-std=gnu11", "-O3", "-g0", "-fopenmp", *flags],
            optional=True,  # no compiler, another processor: decoding goes through torch
        )
        for name, flags in BUILDS.items()
    ],
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=["torch>=2.13", "einops", "beartype>=0.23", "accelerate", "tqdm", "numpy"],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "matplotlib",
            "transformers",
            "shtab",
            "tensorboard",
            *FEEDBACK,
            "psycopg[binary]>=3.2",
            "selenium",
            "nbclient",
            "ipykernel",
        ],  # the extras that tests use, too
        "bench": ["transformers"],  # the peer that tests/benchmarks compares with
        "completion": ["shtab"],  # palm-rlhf --print-completion
        "feedback": FEEDBACK,  # palm-rlhf feedback: people judge in a browser
        "feedback-postgres": [*FEEDBACK, "psycopg[binary]>=3.2"],  # the same on PostgreSQL
        "hf": ["transformers", "tokenizers", "datasets"],  # tokenizers, chat templates, classifiers as judges, data
        "plot": ["matplotlib"],  # learning curves, reliability plots
        "wandb": ["wandb"],  # log_with="wandb"
        "tensorboard": ["tensorboard"],  # log_with="tensorboard"
    },
    entry_points={"console_scripts": ["palm-rlhf=palm_rlhf_pytorch.cli.main:main"]},
    keywords=["reinforcement learning", "human feedback", "language model", "transformers"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX",
        "Typing :: Typed",
    ],
)
