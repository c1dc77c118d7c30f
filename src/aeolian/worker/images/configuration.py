"""Instructions that only change an image's description, not its files: pure functions over StoredImage."""

import posixpath
from collections.abc import Mapping

import msgspec

from aeolian.domain.errors import InvalidArgument
from aeolian.worker.images.dockerfile import Instruction, assignments, expand, words
from aeolian.worker.images.store import StoredImage

KEYWORDS = frozenset(
    [
        "CMD",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "HEALTHCHECK",
        "LABEL",
        "MAINTAINER",
        "ONBUILD",
        "SHELL",
        "STOPSIGNAL",
        "USER",
        "VOLUME",
        "WORKDIR",
    ]
)


def configured(image: StoredImage, instruction: Instruction, variables: Mapping[str, str]) -> StoredImage:
    """The image as this instruction describes it. `variables`: what `$NAME` means here (ARG, then ENV).

    HEALTHCHECK and ONBUILD say nothing that containers here make use of. Raises InvalidArgument.
    """
    rest = instruction.rest
    match instruction.keyword:
        case "ENV":
            return _changed(image, env={**image.env, **assignments(rest, variables)})
        case "LABEL":
            return _changed(image, labels={**image.labels, **assignments(rest, variables)})
        case "MAINTAINER":
            return _changed(image, labels={**image.labels, "maintainer": rest})
        case "WORKDIR":
            return _changed(image, workdir=absolute(image.workdir, _one_word(instruction, variables)))
        case "USER":
            return _changed(image, user=_one_word(instruction, variables))
        case "STOPSIGNAL":
            return _changed(image, stop_signal=_one_word(instruction, variables))
        case "EXPOSE":
            return _changed(image, ports=_more(image.ports, expand(rest, variables).split()))
        case "VOLUME":
            return _changed(image, volumes=_more(image.volumes, words(expand(rest, variables))))
        case "SHELL":
            if not instruction.exec_form:
                raise InvalidArgument(f'SHELL {rest!r}: it must be a list such as ["/bin/bash", "-c"]')
            return _changed(image, shell=tuple(instruction.exec_form))
        case "CMD":
            return _changed(image, cmd=_command(image, instruction))
        case "ENTRYPOINT":
            return _changed(image, entrypoint=_command(image, instruction))
    return image


def absolute(workdir: str, path: str) -> str:
    """`path` as seen from the working directory, in normal form."""
    joined = posixpath.normpath(posixpath.join("/", workdir, path))
    return "/" + joined.lstrip("/")


def _changed(image: StoredImage, **fields) -> StoredImage:
    return msgspec.structs.replace(image, **fields)


def _one_word(instruction: Instruction, variables: Mapping[str, str]) -> str:
    """The argument, quotes taken off: clients quote paths as a shell would."""
    expanded = expand(instruction.rest, variables)
    value = " ".join(words(expanded)) if any(quote in expanded for quote in "\"'") else expanded
    if not value:
        raise InvalidArgument(f"{instruction} comes to nothing: a variable in it is not set")
    return value


def _command(image: StoredImage, instruction: Instruction) -> tuple[str, ...]:
    listed = instruction.exec_form
    if listed is not None:
        return tuple(listed)
    return (*image.shell, instruction.rest) if instruction.rest else ()


def _more(known: tuple[str, ...], added: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *added)))
