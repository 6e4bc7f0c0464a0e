"""What a file looks like that is no checkpoint, for messages: other programs' formats by their first bytes."""


def describe(head: bytes) -> str:
    """What a file that is neither format looks like, by its first bytes."""
    if not head:
        return "it is empty"
    if len(head) < 9:
        return f"it is truncated to {len(head)} bytes"
    if head.startswith(b"version https://"):
        return "it is a Git LFS pointer; fetch the real file (git lfs pull)"
    if head[0] == 0x80 and 2 <= head[1] <= 5:
        return (
            "it is a bare pickle, which can run any code when read; save it again with torch.save (torch 1.6 or later)"
        )
    signs = {b"\x93NUMPY": "a numpy array", b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file", b"\x1f\x8b": "a gzip"}
    for sign, name in signs.items():
        if head.startswith(sign):
            return f"it is {name}"
    return f"it starts with {head!r}, neither a torch.save zip nor safetensors"


def describe_zip(names: list[str]) -> str:
    """What a zip that is no checkpoint looks like, by the names of its entries."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript program; save a state dict instead"
    if names and all(name.endswith(".npy") for name in names):
        return "it is a numpy .npz archive"
    return f"it is a zip of other files ({', '.join(names[:5])})"
