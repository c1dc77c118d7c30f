"""COPY and ADD inside the image that is being built. Imported by `step.py`: standard library only.

Runs with the image as its root folder, so links in the image and in the sources cannot lead out of it.
"""

import fnmatch
import os
import posixpath
import shutil
import stat
import tarfile

try:  # what tarfile would look for once the host is out of sight
    import bz2  # noqa: F401
    import gzip  # noqa: F401
    import lzma  # noqa: F401
except ImportError:
    pass

CHUNK_BYTES = 1 << 20
MAX_LINKS = 40


class Refused(Exception):
    """COPY cannot do this; the message says why."""


def copy(job):
    """`job`: {"sources": patterns; "target": absolute path; "into_folder": bool; "chown", "chmod", "exclude", "unpacks"; "owner": (uid, gid) in place of "chown"},
    and either "files": [[path, where its content is, mode], …], all that the context holds, or "tree": a folder.

    Raises Refused.
    """
    owner = job.get("owner") or (_owner(job["chown"]) if job["chown"] else None)
    mode = int(job["chmod"], 8) if job["chmod"] else None
    source = Tree(job["tree"]) if job.get("tree") else Context(job["files"])
    placed = Placed(job["target"], owner, mode, job["exclude"])
    found = [match for pattern in job["sources"] for match in matches(source, pattern)]
    target = job["target"]
    if not found:  # WORKDIR
        placed.folder(target)
    into_folder = job["into_folder"] or os.path.isdir(target)
    if len(found) > 1 and not into_folder:
        raise Refused(f"{len(found)} sources for {target}: a folder must end in '/'")
    for path in found:
        if source.is_folder(path):
            placed.folder(target)
            for name, entry in source.below(path):
                placed.entry(posixpath.join(target, name), name, entry)
            continue
        entry = source.entry(path)
        if job["unpacks"] and placed.unpacked(entry, target):
            continue
        name = posixpath.basename(path)
        if into_folder:
            placed.folder(target)
        placed.entry(posixpath.join(target, name) if into_folder else target, name, entry)


class Entry:
    """What is to be placed: `kind` is "file", "folder" or "link"."""

    def __init__(self, kind, content="", mode=0o644, owner=(0, 0), link="", xattrs=()):
        self.kind, self.content, self.mode, self.owner = kind, content, mode, owner
        self.link, self.xattrs = link, xattrs


class Context:
    """The build's context: plain files, folders only by their paths."""

    def __init__(self, files):
        self._files = {path.strip("/"): Entry("file", content, mode) for path, content, mode in files}
        self._folders = {""}
        for path in self._files:
            while path := posixpath.dirname(path):
                self._folders.add(path)

    def names(self, folder):
        prefix = folder + "/" if folder else ""
        paths = (*self._files, *self._folders)
        return sorted(
            {path[len(prefix) :].split("/")[0] for path in paths if path.startswith(prefix) and path != folder}
        )

    def exists(self, path):
        return path in self._files or path in self._folders

    def is_folder(self, path):
        return path in self._folders

    def entry(self, path):
        return self._files[path]

    def below(self, path):
        """(relative path, entry), folders before what they hold."""
        prefix = path + "/" if path else ""
        for folder in sorted(self._folders):
            if folder.startswith(prefix) and folder != path:
                yield folder[len(prefix) :], Entry("folder", mode=0o755)
        for name, entry in sorted(self._files.items()):
            if name.startswith(prefix):
                yield name[len(prefix) :], entry


class Tree:
    """The root file system of another stage or image."""

    def __init__(self, root):
        self._root = root

    def _place(self, path):
        """Where `path` lies, links followed as that file system's own processes would."""
        at, parts, num_links = "", [part for part in path.split("/") if part not in ("", ".")], 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                at = posixpath.dirname(at)
            elif os.path.islink(f"{self._root}{at}/{part}"):
                num_links += 1
                if num_links > MAX_LINKS:
                    raise Refused(f"{path}: too many links")
                link = os.readlink(f"{self._root}{at}/{part}")
                at = "" if link.startswith("/") else at
                parts = [name for name in link.split("/") if name not in ("", ".")] + parts
            else:
                at = f"{at}/{part}"
        return self._root + at

    def names(self, folder):
        return sorted(os.listdir(self._place(folder)))

    def exists(self, path):
        return os.path.lexists(self._place(path))

    def is_folder(self, path):
        return os.path.isdir(self._place(path))

    def entry(self, path):
        return _entry_of(self._place(path))

    def below(self, path):
        top = self._place(path)
        for folder, folders, names in os.walk(top):
            for name in sorted((*folders, *names)):
                place = os.path.join(folder, name)
                yield os.path.relpath(place, top), _entry_of(place)


def matches(source, pattern):
    """The paths that a COPY source names. Raises Refused when there are none."""
    found = [""]
    for part in [part for part in posixpath.normpath("/" + pattern).split("/") if part]:
        if any(char in part for char in "*?["):
            found = [
                posixpath.join(folder, name)
                for folder in found
                if source.is_folder(folder)
                for name in source.names(folder)
                if fnmatch.fnmatchcase(name, part)
            ]
        else:
            found = [posixpath.join(folder, part) for folder in found]
            found = [path for path in found if source.exists(path)]
    if not found:
        raise Refused(f"{pattern}: no such file or folder to copy")
    return found


class Placed:
    """Puts entries into the image."""

    def __init__(self, target, owner, mode, exclude):
        self._owner, self._mode, self._exclude = owner, mode, exclude

    def folder(self, path):
        """With the folders on the way to it."""
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            raise Refused(f"{path} is a file: nothing can be copied into it")
        self.folder(posixpath.dirname(path))
        os.mkdir(path, 0o755)
        if self._owner:
            os.chown(path, *self._owner)

    def entry(self, path, name, entry):
        if any(_excluded(name, pattern) for pattern in self._exclude):
            return
        owner = self._owner or entry.owner
        if entry.kind == "folder":
            fresh = not os.path.isdir(path)
            self.folder(path)
            if fresh:
                os.chown(path, *owner)
                os.chmod(path, self._mode if self._mode is not None else entry.mode)
            return
        self.folder(posixpath.dirname(path))
        if os.path.isdir(path) and not os.path.islink(path):
            raise Refused(f"{path} is a folder: no file can be put in its place")
        if os.path.lexists(path):
            os.unlink(path)
        if entry.kind == "link":
            os.symlink(entry.link, path)
            os.lchown(path, *owner)
            return
        with open(entry.content, "rb") as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        os.chown(path, *owner)
        os.chmod(path, self._mode if self._mode is not None else entry.mode)
        for attribute, value in entry.xattrs:
            os.setxattr(path, attribute, value)

    def unpacked(self, entry, target):
        """ADD unpacks an archive of its context. False when it is none."""
        try:
            archive = tarfile.open(entry.content)  # noqa: SIM115
        except (tarfile.ReadError, OSError):
            return False
        with archive:
            self.folder(target)
            archive.extractall(target, filter="fully_trusted", numeric_owner=True)
        return True


def _entry_of(place):
    status = os.lstat(place)
    owner, mode = (status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", owner=owner, link=os.readlink(place))
    if stat.S_ISDIR(status.st_mode):
        return Entry("folder", mode=mode, owner=owner)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{place} is neither file, folder nor link")
    names = [name for name in os.listxattr(place) if name == "security.capability" or name.startswith("user.")]
    return Entry("file", place, mode, owner, xattrs=[(name, os.getxattr(place, name)) for name in names])


def _excluded(name, pattern):
    parts = name.split("/")
    heads = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatch.fnmatchcase(head, pattern.removeprefix("**/")) for head in (*heads, parts[-1]))


def _owner(text):
    user, _, group = text.partition(":")
    try:
        uid, gid, _ = user_ids(user)
        return uid, group_id(group) if group else gid
    except LookupError as error:
        raise Refused(f"--chown={text}: there is no {error} in the image") from None


def user_ids(name):
    """(uid, gid, home) as the image's own passwd has it. Raises LookupError."""
    for fields in _database("/etc/passwd"):
        if len(fields) > 5 and name in (fields[0], fields[2]):
            return int(fields[2]), int(fields[3]), fields[5]
    if name.isdigit():
        return int(name), 0 if name == "0" else int(name), "/root" if name == "0" else "/"
    if name == "root":
        return 0, 0, "/root"
    raise LookupError(name)


def group_id(name):
    """Raises LookupError."""
    for fields in _database("/etc/group"):
        if len(fields) > 2 and name in (fields[0], fields[2]):
            return int(fields[2])
    if name.isdigit():
        return int(name)
    if name == "root":
        return 0
    raise LookupError(name)


def _database(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return [line.rstrip("\n").split(":") for line in stream]
    except OSError:
        return []
