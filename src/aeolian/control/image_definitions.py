"""Definitions of images: what the SDK sent, checked, and turned into a digest and into what a worker builds from.

Pure functions over protobuf messages.
"""

import hashlib

from modal_proto import api_pb2

from aeolian.control.environments import BUILDER_VERSIONS
from aeolian.domain.containers import MountSpec
from aeolian.domain.errors import InvalidArgument, Unimplemented
from aeolian.domain.images import ContextFile, ImageSpec, RegistryAccess

MAX_DEFINITION_BYTES = 64 << 20
MAX_COMMANDS = 10_000
ARCHITECTURES = {api_pb2.ARCH_X86_64: "x86_64", api_pb2.ARCH_AARCH64: "aarch64"}


def check(image: api_pb2.Image, builder_version: str, build_function_id: str) -> None:
    """Raises InvalidArgument for what cannot be built, Unimplemented for what Aeolian cannot do (yet)."""
    if builder_version not in BUILDER_VERSIONS:
        raise InvalidArgument(
            f"{builder_version!r} is no image builder version: use one of {', '.join(BUILDER_VERSIONS)}"
        )
    if image.build_function_def:
        raise InvalidArgument("this client is too old to build images by functions: use modal 1.4 or newer")
    has_function = image.HasField("build_function")
    if not image.dockerfile_commands and not has_function:
        raise InvalidArgument("an image needs Dockerfile commands or a build function, and this one has neither")
    if image.dockerfile_commands and has_function:
        raise InvalidArgument("an image cannot have Dockerfile commands and a build function in the same layer")
    if has_function and not build_function_id:
        raise InvalidArgument("an image that a function builds needs the id of that function (build_function_id)")
    if has_function and len(image.base_images) != 1:
        raise InvalidArgument(f"a build function needs exactly one base image, not {len(image.base_images)}")
    if len(image.dockerfile_commands) > MAX_COMMANDS:
        raise InvalidArgument(
            f"the image has {len(image.dockerfile_commands):,} lines of Dockerfile commands, the limit is {MAX_COMMANDS:,}"
        )
    if (size := image.ByteSize()) > MAX_DEFINITION_BYTES:
        raise InvalidArgument(
            f"the definition of the image has {size:,} bytes, the limit is {MAX_DEFINITION_BYTES:,}: "
            "add large files by `add_local_file` or `add_local_dir`"
        )
    tags = [base.docker_tag for base in image.base_images]
    if len(set(tags)) != len(tags) or not all(base.image_id for base in image.base_images):
        raise InvalidArgument(f"each base image needs an id and a name of its own (the names are {', '.join(tags)})")
    if image.volume_mounts:
        raise Unimplemented(
            "Volumes in build steps (`run_commands(volumes=…)`) are not supported (yet): "
            "use `run_function(volumes=…)`, or copy the files with `add_local_dir`"
        )
    if image.image_registry_config.registry_auth_type == api_pb2.REGISTRY_AUTH_TYPE_AWS:
        raise Unimplemented(
            "Aeolian does not sign in to AWS by itself: put the result of `aws ecr get-login-password` into a Secret "
            "with REGISTRY_USERNAME=AWS and REGISTRY_PASSWORD, and pass that"
        )


def recipe(image: api_pb2.Image, builder_version: str, workspace: str, secrets: str) -> str:
    """The digest of what makes the image. Equal definitions have equal ones, whichever App they belong to.

    `secrets`: a fingerprint of the variables that the build sees. Secrets that belong to an App have new ids in each
    run, so ids tell nothing. Credentials of a registry do not change what is pulled.
    """
    kept = api_pb2.Image()
    kept.CopyFrom(image)
    for field in ("secret_ids", "image_registry_config", "runtime", "runtime_debug", "version"):
        kept.ClearField(field)
    bases = sorted(image.base_images, key=lambda base: base.docker_tag)
    files = sorted(image.context_files, key=lambda file: file.filename)
    del kept.base_images[:], kept.context_files[:]
    kept.base_images.extend(bases)
    kept.context_files.extend(files)
    head = f"{workspace}\0{builder_version}\0{secrets}\0".encode()
    return hashlib.sha256(head + kept.SerializeToString(deterministic=True)).hexdigest()


def spec(
    image: api_pb2.Image,
    *,
    context: MountSpec | None,
    registry: RegistryAccess,
    builder_version: str,
    ignore_cache: bool,
) -> ImageSpec:
    """What a worker needs to know to build it."""
    gpu = image.gpu_config
    return ImageSpec(
        dockerfile_commands=tuple(image.dockerfile_commands),
        base_image_ids={base.docker_tag: base.image_id for base in image.base_images},
        context=context.files if context is not None else (),
        context_files=tuple(ContextFile(file.filename, file.data) for file in image.context_files),
        build_args=dict(image.build_args),
        builder_version=builder_version,
        gpu=f"{gpu.gpu_type or 'any'}:{gpu.count}" if gpu.count else "",
        registry=registry,
        arch=ARCHITECTURES.get(image.arch, ""),
        ignore_cache=ignore_cache,
    )


def registry_access(config: api_pb2.ImageRegistryConfig, env: dict[str, str]) -> RegistryAccess:
    """Credentials out of the variables of the registry's Secret. Raises InvalidArgument naming what is missing."""
    if config.registry_auth_type == api_pb2.REGISTRY_AUTH_TYPE_GCP:
        wanted, username = ["SERVICE_ACCOUNT_JSON"], "_json_key"
    elif config.registry_auth_type == api_pb2.REGISTRY_AUTH_TYPE_STATIC_CREDS:
        wanted, username = ["REGISTRY_USERNAME", "REGISTRY_PASSWORD"], env.get("REGISTRY_USERNAME", "")
    else:
        return RegistryAccess()
    if missing := [name for name in wanted if not env.get(name)]:
        raise InvalidArgument(f"Secret {config.secret_id} cannot open the registry: it lacks {' and '.join(missing)}")
    return RegistryAccess(username, env[wanted[-1]])
