"""The tensors of a Hugging Face directory, read from memory-mapped safetensors straight into what a device takes.

A safetensors file is the length of its header in 8 bytes, the header in JSON, and the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import mmap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rmjax.runtime import notes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(jnp.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(jnp.float16)}

VALUE_HEAD = (
    "a value head of TRL or LLaMA-Factory, which is not used: to use it, write its weight as score.weight beside the "
    "model's; its bias shifts all rewards alike"
)

READERS = 8  # threads: one alone waits for every page of the map in turn
PIECE = 16 * 2**20  # bytes that a thread copies at a time
ALIGNED = 64  # bytes; a CPU device uses memory so aligned as it is, and copies any other


class Tensor(NamedTuple):
    """A tensor of a file; nothing of it is read before it is used."""

    dtype: str  # as the file names it; one of DTYPES can be read
    shape: tuple[int, ...]  # its shape
    data: np.ndarray  # uint8 [bytes], a view of the memory map

    def array(self) -> np.ndarray:
        """A view of the memory map, in the tensor's own dtype."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors by name."""
    tensors: dict[str, Tensor] = {}
    for path in _files(directory):
        tensors.update(open_file(path))
    return tensors


def open_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name."""
    try:
        safe_open(path, framework="numpy")  # checks the header against the file's length
        return dict(_tensors(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is it a whole download?") from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(start - 8))
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[start:]
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])


def _files(directory: Path) -> list[Path]:
    """The files that transformers would read: a single one, if it is there, else those that an index names."""
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
    elif index.is_file():
        files = [directory / name for name in _named(index)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which its {INDEX} names")
    else:
        found = sorted(file.name for file in directory.iterdir())
        raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX} but {', '.join(found)}: {advice(found)}")
    if others := unread(directory, files):
        notes.tell(f"{directory}: {' and '.join(file.name for file in files[:2])} is read, not: {', '.join(others)}")
    return files


def unread(directory: Path, files: Sequence[Path]) -> list[str]:
    """Weights beside those that are read, by name, with a word on what they are."""
    others = sorted({*directory.glob("*.safetensors"), *directory.glob("value_head.*")}.difference(files))
    names = [f"{file.name} ({VALUE_HEAD})" if file.stem == "value_head" else file.name for file in others]
    if (directory / INDEX).is_file() and files[0].name == WEIGHTS and not _names_single(directory / INDEX):
        names.insert(0, f"{INDEX} (it names other files; transformers, too, takes the single one)")
    return names


def _names_single(index: Path) -> bool:
    try:
        return _named(index) == [WEIGHTS]
    except ValueError:
        return False


def advice(names: Collection[str]) -> str:
    """What a model directory without safetensors of a whole model is, by its files' names, and what to do."""
    if any(name.endswith(".gguf") for name in names):
        return (
            "GGUF files are weights quantized for llama.cpp, which are not read; take the Hugging Face directory that "
            "they were made from"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "pickled weights are not read; load it in transformers and save_pretrained it as safetensors"
    return "expected safetensors"


def _named(index: Path) -> list[str]:
    """The files that an index names, in order. They are files beside it: a name with a folder could lead anywhere."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index: expected JSON with a weight_map of names to files ({error!r})"
        ) from None
    plain = lambda name: isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
    if not names or (wrong := [name for name in names if not plain(name)]):
        found = ", ".join(sorted(map(repr, wrong))[:3]) if names else "nothing"
        raise ValueError(f"{index} names {found}; expected .safetensors files beside it, without folders")
    return sorted(names)


def read(tensors: Sequence[Tensor], index: tuple[slice, ...], stacked: bool) -> np.ndarray:
    """Reads a part of one tensor, or of several of one shape stacked on a new first axis, into new memory: the only
    copy there is. `index` has a slice for each axis. Tensors of several dtypes become float32."""
    chosen = [tensor.array() for tensor in (tensors[index[0]] if stacked else tensors)]
    sources = [array[index[1:] if stacked else index] for array in chosen]
    dtype = common_dtype(tensors)
    shape = (*([len(sources)] if stacked else []), *sources[0].shape)
    part = _aligned(shape, dtype)
    copies = [piece for pair in zip(part if stacked else [part], sources) for piece in _pieces(*pair)]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda pair: _copy(*pair), copies))
    return part


def common_dtype(tensors: Sequence[Tensor]) -> np.dtype:
    """The dtype that `read` returns."""
    dtypes = {DTYPES[tensor.dtype] for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def _pieces(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts both along their first axis into pieces of about PIECE bytes."""
    step = max(1, PIECE * len(source) // max(source.nbytes, 1))
    for start in range(0, len(source), step):
        yield target[start : start + step], source[start : start + step]


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    if target.dtype == source.dtype:  # numpy copies numbers of its own types without holding the interpreter's lock
        target, source = (x.view(f"u{x.dtype.itemsize}") for x in (target, source))
    target[...] = source
