"""A folder or an untrusted archive in; a folder with its images, or an InputError, out."""

from __future__ import annotations

import errno
import logging
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from get_images import BY_WINDOWS, HIDDEN, by_kind, is_image, may_begin_image
from retrieval.errors import InputError, RunError, printable
from retrieval.files import naming

# Images hardly shrink in an archive: an archive that grows more than this is made to fill a disk.
MOST_GROWTH, ALWAYS_ALLOWED = 100, 2**30  # times its size; bytes
# The errors of a name that the disk cannot take: too long, a file that is also a folder, or other characters.
OF_NAMES = {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ}

log = logging.getLogger("retrieval.datasets")


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int  # bytes when unpacked, according to the archive
    is_link: bool
    open: Callable[[], IO[bytes]]


@contextmanager
def unpacked(source: Path, beside: Path) -> Iterator[Path]:
    """Yield the folder `source`, or a temporary folder with the images of the archive `source`.

    The temporary folder lies beside the folder `beside`, so that files can be linked from one to the other.
    Zip and tar (also compressed) are read. Raises InputError for an archive that cannot be read, would write
    outside its folder, holds links, or would grow more than images do; RunError if the disk has no room.
    """
    if source.is_dir():
        yield source
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.unpacked-", dir=beside.parent) as folder:
        try:
            with naming(beside):
                _unpack(source, Path(folder))
        except (InputError, RunError):
            raise
        except Exception as error:  # decompressors raise anything on damaged bytes
            if isinstance(error, OSError) and error.errno:  # it is the disk
                raise
            raise InputError(
                f"{source} cannot be unpacked ({error or type(error).__name__}): download it again"
            ) from None
        yield Path(folder)


def _unpack(source: Path, folder: Path) -> None:
    if tarfile.is_tarfile(source):  # first: a tar that ends with a zip looks like a zip
        with tarfile.open(source) as archive:
            members = [Member(info.name, info.size, not info.isfile(), partial(archive.extractfile, info))
                       for info in archive.getmembers() if not info.isdir()]  # fmt: skip
            _write(source, members, folder)
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            files = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            if any(info.flag_bits & 1 for info in files):
                raise InputError(f"{source} is locked by a password: unpack it, and give the folder")
            members = [Member(info.filename, info.file_size, stat.S_ISLNK(info.external_attr >> 16),
                              partial(archive.open, info)) for info in files]  # fmt: skip
            _write(source, members, folder)
    else:
        raise InputError(f"{source} is neither a zip nor a tar archive, or only a part of one: "
                         "download it again, or unpack it, and give the folder")  # fmt: skip


def _write(source: Path, members: list[Member], folder: Path) -> None:
    """Write the images among the members, all of them below the folder."""
    # Some programs of Windows write backslashes.
    members = [member._replace(name=member.name.replace("\\", "/")) for member in members]
    for member in members:
        _refuse_unless_plain(source, member)
    images = [member for member in members if _is_image(member)]
    names = {member.name for member in members} - {member.name for member in images}
    others = by_kind(sorted(name for name in names if not _is_hidden(name)))
    if not images:
        raise InputError(
            f"{source} holds no images, only {printable(others) or 'hidden files'}: give what holds images "
            "(archives inside it are yours to unpack)"
        )
    if others:
        log.warning("files in %s that are no images are left out: %s", source, others)
    needed, free = sum(member.size for member in images), shutil.disk_usage(folder).free
    if needed > max(ALWAYS_ALLOWED, MOST_GROWTH * source.stat().st_size):
        raise InputError(
            f"{source} would grow from {source.stat().st_size / 1e6:.1f} MB to {needed / 1e6:.0f} MB, more "
            "than archives of images do: unpack it yourself if you trust it, and give the folder"
        )
    if needed > free:
        raise RunError(
            f"{source} takes {needed / 1e9:.1f} GB when unpacked, and the disk of {folder.parent} has "
            f"{free / 1e9:.1f} GB free: make room, or give another --out"
        )
    for member in images:
        try:
            _write_member(source, member, folder / member.name)
        except OSError as error:
            if error.errno not in OF_NAMES:
                raise
            raise InputError(
                f"{source} holds {member.name[:80]!r}, whose name this disk cannot take "
                f"({error.strerror.lower()}): unpack it yourself, and give the folder"
            ) from None


def _is_image(member: Member) -> bool:
    """Return whether a member is an image, by its name or else by its first bytes."""
    if is_image(member.name):
        return True
    if any(folder.startswith(HIDDEN) for folder in member.name.split("/")[:-1]):
        return False
    with member.open() as packed:
        return may_begin_image(packed.read(16))


def _is_hidden(name: str) -> bool:
    """Return whether a member is hidden, or one of those that Windows and macOS leave everywhere."""
    return name.lower().endswith(BY_WINDOWS) or any(part.startswith(HIDDEN) for part in name.split("/"))


def _write_member(source: Path, member: Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise InputError(
            f"{source} holds {printable(member.name)} twice: unpack it yourself, and give the folder"
        )
    with member.open() as packed, open(path, "wb") as file:
        shutil.copyfileobj(packed, file)  # zipfile and tarfile read no more than the stated size


def _refuse_unless_plain(source: Path, member: Member) -> None:
    parts = PurePosixPath(member.name)
    if parts.is_absolute() or ".." in parts.parts or (parts.parts and ":" in parts.parts[0]):
        raise InputError(
            f"{source} holds {member.name!r}, which would be written outside its folder: do not trust it"
        )
    if member.is_link:
        raise InputError(
            f"{source} holds {member.name!r}, which is a link, not a file: unpack it, and give the folder"
        )
