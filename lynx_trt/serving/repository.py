"""The model repository: a model, the artifact's files, and the copy of lynx_trt that serves them.

    REPOSITORY/
      dial.json               the default quality and the target; an operator changes them while the server runs
      lynx-repository.json    what the repository was made from, and how
      NAME/config.pbtxt       text in, tokens streamed out (Python backend)
      NAME/1/model.py         with lynx_trt/, and the artifact's files in artifact/

Files of the artifact are hard links where the file system allows it, so they take no space twice, a container that
mounts the repository alone finds them, and building the artifact anew leaves a running server's files alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lynx_trt import __version__
from lynx_trt.artifact import MANIFEST, Artifact, sha256
from lynx_trt.errors import ServingError, UsageError
from lynx_trt.partials import partial
from lynx_trt.runtime.sampling import recommended
from lynx_trt.serving.config import LAYER_LABELS, WARM_UP_TEXT, text_config
from lynx_trt.serving.dial import DIAL, DialSetting
from lynx_trt.serving.settings import Settings

MARKER = "lynx-repository.json"
# What a serving process imports of lynx_trt; the rest needs torch and what else a server doesn't have.
MODULES = (
    "__init__.py",
    "artifact.py",
    "budgets.py",
    "errors.py",
    "experts.py",
    "fp8.py",
    "int4.py",
    "machine.py",
    "mxfp4.py",
    "nvfp4.py",
    "preflight.py",
    "selection.py",
)
PACKAGES = {
    "runtime": ("*.py",),
    "serving": ("*.py",),
    "tensorrt": ("*.py",),
    "plugins": ("*.py",),
    "export": ("__init__.py", "ops.py"),
}


@dataclass(frozen=True)
class Repository:
    """A written repository."""

    folder: Path
    name: str
    reused: bool = False


def check_name(name: str) -> str:
    """A model's name: it is a folder and part of a URL.

    Raises:
        UsageError: it has characters that either can't have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"the name {name!r} can't be a model's: use letters, digits, '_', '.' and '-'; see --name")
    return name


def write_repository(
    artifact: Artifact,
    target: Path,
    *,
    name: str,
    settings: Settings,
    overwrite: bool = False,
) -> Repository:
    """Write the repository, or find it as it should be.

    Raises:
        UsageError: `target` is something else, or a repository of something else and `overwrite` is not set.
        ServingError: it can't be written.
    """
    check_name(name)
    made_from = _made_from(artifact, name, settings)
    if _is_same(target, made_from):
        return Repository(target, name, reused=True)
    with _writing(target, overwrite=overwrite) as folder:
        _write_text_model(folder / name, artifact, name, settings)
        DialSetting.of(settings).write(folder / DIAL)
        (folder / MARKER).write_text(_json(made_from), encoding="utf-8")
    return Repository(target, name)


def set_dial(
    folder: Path, *, quality: str | None = None, tpot: float | None = None, max_kl: float | None = None
) -> DialSetting:
    """Change the default quality of a repository, its targets, or all of them, also while it is served.

    The server looks every second. What is None stays as it is.

    Raises:
        UsageError: `folder` is no repository of ours, or there is no such quality or target for its artifact.
    """
    from lynx_trt.artifact import read
    from lynx_trt.runtime.quality import Dial

    if not (folder / MARKER).is_file():
        raise UsageError(f"{folder} is no repository that python -m lynx_trt.serve has written")
    made_from = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    settings = Settings.of(made_from["settings"])
    try:
        setting = DialSetting.read((folder / DIAL).read_text(encoding="utf-8"), settings)
    except (OSError, UsageError):  # whatever became of it: it is written anew
        setting = DialSetting.of(settings)
    changes: dict[str, Any] = {"quality": quality, "tpot": tpot, "max_kl": max_kl}
    setting = replace(setting, **{name: value for name, value in changes.items() if value is not None})
    manifest = read(folder / made_from["name"] / "1" / "artifact").manifest
    setting.within(settings).check_model(Dial.of(manifest), manifest.model.rewinds)
    setting.write(folder / DIAL)
    return setting


def _made_from(artifact: Artifact, name: str, settings: Settings) -> dict[str, Any]:
    return {
        "name": name,
        "lynx_trt": __version__,
        "artifact": sha256(artifact.path(MANIFEST)),
        "settings": settings.parameters(),
        "code": _code_digest(),
    }


def _is_same(target: Path, made_from: dict[str, Any]) -> bool:
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == made_from)


@contextmanager
def _writing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well."""
    target = target.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not (target / MARKER).is_file():
            raise UsageError(f"{target} exists and is no model repository of ours; choose another --output")
        if not overwrite:
            raise UsageError(
                f"{target} was made from another artifact or with other settings; choose another --output, or pass "
                "--overwrite to replace it"
            )
    try:
        with partial(target) as aside:
            yield aside
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    except OSError as error:
        raise ServingError(f"can't write {target}: {error.strerror or error}; choose another --output") from error


def _write_text_model(folder: Path, artifact: Artifact, name: str, settings: Settings) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    manifest = artifact.manifest
    config = text_config(name, manifest, settings, recommended(artifact.folder))
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / LAYER_LABELS).write_text(_lines([layer.name for layer in manifest.model.moe_layers]), encoding="utf-8")
    warm_up = folder / "warmup"
    warm_up.mkdir()
    text = WARM_UP_TEXT.encode()
    (warm_up / "text").write_bytes(struct.pack("<I", len(text)) + text)
    (warm_up / "max_tokens").write_bytes(struct.pack("<i", 4))
    (version / "artifact").mkdir()
    for file in [MANIFEST, *manifest.files]:
        _link(artifact.path(file), version / "artifact" / file)
    _copy_code(version)


def _lines(labels: list[str]) -> str:
    """One label a line; what would break a line is escaped."""
    return "".join(json.dumps(label, ensure_ascii=False)[1:-1] + "\n" for label in labels)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _code() -> dict[str, Path]:
    """The files of lynx_trt that a serving process may import: path in the package, and where it lies."""
    package = Path(__file__).parent.parent
    found = {name: package / name for name in MODULES}
    for name, patterns in PACKAGES.items():
        # A checkout has some packages beside lynx_trt/, an installation has them in it.
        spec = importlib.util.find_spec(f"lynx_trt.{name}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0])
        found |= {f"{name}/{path.name}": path for pattern in patterns for path in folder.glob(pattern)}
    return dict(sorted(found.items()))


def _code_digest() -> str:
    digest = hashlib.sha256()
    for name, path in _code().items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _copy_code(version: Path) -> None:
    for name, path in _code().items():
        target = version / "lynx_trt" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(Path(__file__).parent / "model.py", version / "model.py")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
