"""The demo's data: questions about the running Python's standard library, answered by its docstrings.

The library's source is parsed, never imported. Each documented module, class and function gives one pair: a question
that names it, and the first paragraph of its docstring. Whether a pair is held out depends on a hash of its answer
alone, so an answer is on the same side under whatever name, and in every version of Python, it appears.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import new_folder

# Not library code: tests, applications, vendored or generated files, and what third parties installed.
SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings", "site-packages",
    "dist-packages", "lib-dynload", "__pycache__", "__phello__", "_pyrepl",
}  # fmt: skip
SHORTEST, LONGEST = 16, 300  # characters of an answer
HELD_OUT_EVERY = 10

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    """A question, the start of a docstring that answers it, and the docstring's further paragraphs."""

    prompt: str
    completion: str
    further: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """What two answers share that differ in punctuation or case only."""
        return _key(self.completion)

    def held_out(self, every: int = HELD_OUT_EVERY) -> bool:
        """Whether the pair is kept from training: one answer in `every`, chosen by the SHA-256 of its key."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") % every == 0


@dataclass(frozen=True)
class Corpus:
    """The pairs to train on and those held out. None appears twice, and no held-out answer is inside a trained one."""

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]

    def write(self, folder: str | Path) -> None:
        """Write `train.jsonl` and `valid.jsonl`, one {"prompt", "completion"} a line."""
        folder = Path(folder)
        new_folder(folder)
        for name, pairs in (("train.jsonl", self.train), ("valid.jsonl", self.valid)):
            lines = (json.dumps({"prompt": p.prompt, "completion": p.completion}, ensure_ascii=False) for p in pairs)
            _write(folder / name, "".join(line + "\n" for line in lines))

    def pretraining_texts(self) -> Iterator[str]:
        """Documents of the training side only: each docstring whole, without paragraphs that hold a held-out answer."""
        for pair in self.train:
            kept = (text for text in pair.further if not _holds_any(text, self.valid))
            yield "\n\n".join([pair.prompt, pair.completion, *kept])


def collect(root: str | Path | None = None, held_out_every: int = HELD_OUT_EVERY) -> Corpus:
    """Read the standard library's source (or any folder of Python source), in sorted order.

    Raises UserError when there is none: some systems ship Python without its source files.
    """
    folder = Path(root or sysconfig.get_path("stdlib"))
    pairs: dict[str, Pair] = {}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        parts = path.relative_to(folder).with_suffix("").parts
        if not SKIPPED_FOLDERS & set(parts):
            for pair in _pairs(path, _module_name(parts)):
                pairs.setdefault(pair.key, pair)
    valid = tuple(pair for pair in pairs.values() if pair.held_out(held_out_every))
    train = tuple(pair for pair in pairs.values() if not _holds_any(pair.completion, valid))
    if not train or not valid:
        raise UserError(f"{folder}: holds too few Python source files with docstrings")
    return Corpus(train, valid)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Train a byte-level BPE of `vocab_size` entries and write tokenizer.json and tokenizer_config.json to `folder`.

    Equal texts in equal order give equal files. `<|im_end|>` ends a turn and a text.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    new_folder(folder)
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text).lower().strip()


def _holds_any(text: str, pairs: Iterable[Pair]) -> bool:
    """Whether one of the pairs' answers stands in `text`, punctuation and case aside."""
    key = _key(text)
    return any(pair.key in key for pair in pairs)


def _module_name(parts: tuple[str, ...]) -> str:
    """`("json", "__init__")` is json; the Python twin of a C module is known by that module's name: `_pyio` is io."""
    names = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join((names[0].removeprefix("_py") if len(names) == 1 else names[0], *names[1:]))


def _pairs(path: Path, module: str) -> Iterator[Pair]:
    """The pairs of one source file, in the order they stand; nothing private, nothing of a file that does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    if any(part.startswith("_") for part in module.split(".")):
        return
    yield from _pair(f"What is the module {module} for?", tree)
    yield from _members(tree, module)


def _members(scope: ast.Module | ast.ClassDef, owner: str) -> Iterator[Pair]:
    for node in scope.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _pair(f"What is {name}?", node)
            yield from _members(node, name)
        else:
            method = isinstance(scope, ast.ClassDef)
            yield from _pair(f"What does {name}({_parameters(node.args, method)}) do?", node)


def _parameters(args: ast.arguments, method: bool) -> str:
    """The parameters' names as they are written, `self` and `cls` left out."""
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names = names[1:] if method and names[:1] in (["self"], ["cls"]) else names
    names += [f"*{args.vararg.arg}"] if args.vararg else ["*"] if args.kwonlyargs else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    text = ", ".join(names)
    return text if len(text) <= 80 else "..."


def _pair(prompt: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Pair]:
    docstring = ast.get_docstring(node, clean=False)
    paragraphs = _paragraphs(docstring) if docstring else []
    # what ends in a colon introduces something that was left out
    if paragraphs and (completion := _shortened(paragraphs[0])) and not completion.endswith(":"):
        yield Pair(prompt, completion, tuple(paragraphs[1:]))


def _paragraphs(docstring: str) -> list[str]:
    """The prose of a docstring, one line a paragraph: no call signatures, examples, tables or headings."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    blocks[0] = re.sub(r"\A\S+\(.*\)( ->.*)?(\n|\Z)", "", blocks[0])  # C modules' twins begin with a signature
    texts = [" ".join(block.split()) for block in blocks if ">>>" not in block]
    return [text for text in texts if len(text) >= SHORTEST and re.match(r"[A-Za-z`'\"*@]", text) and " " in text]


def _shortened(paragraph: str) -> str:
    """As many of the paragraph's first sentences as fit LONGEST characters; empty if the first one does not."""
    if len(paragraph) <= LONGEST:
        return paragraph
    ends = [match.end() for match in re.finditer(r"[.!?](?= [A-Z])", paragraph[: LONGEST + 1])]
    return paragraph[: ends[-1]] if ends and ends[-1] >= SHORTEST else ""


def _write(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: no reader sees half a file."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
