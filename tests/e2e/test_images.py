"""Images, driven by the official client: every builder method, really built, cached, shared and named."""

import re
import subprocess
import sys

MANY_STEPS = '''
import pathlib, subprocess, sys
import modal

HERE = pathlib.Path(__file__).parent
app = modal.App("images")


def prepare():
    """Runs once, while the image is built."""
    pathlib.Path("/opt/prepared").write_text("by a function")
    print("preparing", 6 * 7)


def with_secret():
    import os

    pathlib.Path("/opt/length").write_text(str(len(os.environ["TOKEN"])))


image = (
    modal.Image.debian_slim()
    .apt_install("tree")
    .pip_install("six==1.16.0")
    .pip_install_from_requirements(str(HERE / "requirements.txt"))
    .uv_pip_install("toolz")
    .env({"COLOUR": "deep blue", "PLACE": "here"})
    .run_commands("echo built > /opt/built", "mkdir /opt/folder && echo $COLOUR > /opt/folder/colour")
    .add_local_file(HERE / "requirements.txt", "/opt/copied.txt", copy=True)
    .run_commands("wc -l < /opt/copied.txt > /opt/lines")
    .run_function(prepare)
    .run_function(with_secret, secrets=[modal.Secret.from_dict({"TOKEN": "12345"})])
    .dockerfile_commands("RUN cat <<END > /opt/heredoc\\nfirst\\nEND", "LABEL kind=test", context_dir=HERE)
    .workdir("/opt/folder")
    .add_local_dir(HERE / "data", "/data")
    .add_local_python_source("helper")
)


@app.function(image=image)
def look():
    import os

    import helper
    import six
    import toolz

    def read(path):
        return pathlib.Path(path).read_text().strip()

    return {
        "cwd": os.getcwd(),
        "six": six.__version__,
        "toolz": toolz.__name__,
        "tree": subprocess.run(["tree", "--version"], capture_output=True, text=True).stdout[:4],
        "colour": os.environ["COLOUR"],
        "files": [read(f"/opt/{name}") for name in ("built", "folder/colour", "lines", "prepared", "length", "heredoc")],
        "data": sorted(os.listdir("/data")),
        "helper": helper.answer(),
        "token": os.environ.get("TOKEN"),
        "python": sys.version_info[:2],
        "image": os.environ["MODAL_IMAGE_ID"],
    }


@app.local_entrypoint()
def main():
    seen = look.remote()
    assert seen["cwd"] == "/opt/folder", seen
    assert seen["six"] == "1.16.0" and seen["toolz"] == "toolz", seen
    assert seen["tree"] == "tree", seen
    assert seen["colour"] == "deep blue", seen
    assert seen["files"] == ["built", "deep blue", "2", "by a function", "5", "first"], seen
    assert seen["data"] == ["a.txt", "b.txt"] and seen["helper"] == 42, seen
    assert seen["token"] is None, "a secret of the build is no part of the image"
    assert seen["python"] == sys.version_info[:2], seen
    print("image", seen["image"])
'''


def write_files(folder):
    (folder / "requirements.txt").write_text("idna\ntyping-extensions\n")
    (folder / "helper.py").write_text("def answer():\n    return 42\n")
    (folder / "data").mkdir()
    for name in "ab":
        (folder / "data" / f"{name}.txt").write_text(name)


def test_every_builder_method_does_what_it_says_and_is_cached(aeolian, tmp_path):
    write_files(tmp_path)
    first = aeolian.run_app(MANY_STEPS, tmp_path, timeout_s=580)
    second = aeolian.run_app(MANY_STEPS, tmp_path)
    ids = [re.search(r"^image (im-\w+)", output, re.MULTILINE)[1] for output in (first, second)]
    assert ids[0] == ids[1]
    assert "preparing 42" not in second
    assert "RUN" not in second


def test_a_failing_step_is_shown_with_its_output(aeolian, tmp_path):
    output = aeolian.run_app(
        """
        import modal

        app = modal.App("failing", image=modal.Image.debian_slim().run_commands("echo before the fall", "ls /not/there"))

        @app.function()
        def f():
            pass

        @app.local_entrypoint()
        def main():
            f.remote()
        """,
        tmp_path,
        ok=False,
        timeout_s=400,
    )
    assert "before the fall" in output
    assert "/not/there" in output
    assert "ls /not/there" in output.split("before the fall", 1)[1]


def test_what_cannot_be_had_is_said_plainly(aeolian, tmp_path):
    output = aeolian.python(
        """
        import modal

        app = modal.App.lookup("cannot", create_if_missing=True)
        for what, image in {
            "version": modal.Image.debian_slim(python_version="3.14"),
            "registry": modal.Image.from_registry("registry.invalid/some/thing:1"),
            "micromamba": modal.Image.micromamba(),
        }.items():
            try:
                image.build(app)
            except Exception as error:
                print(what, type(error).__name__, str(error).replace("\\n", " "))
            else:
                print(what, "built")
        """,
        tmp_path,
        timeout_s=400,
    )
    lines = dict(
        line.split(" ", 1)
        for line in output.splitlines()
        if line.split(" ")[0] in ("version", "registry", "micromamba")
    )
    assert "3.14" in lines["version"] or lines["version"] == "built"
    assert "registry.invalid/some/thing:1" in lines["registry"]
    assert "micromamba" in lines["micromamba"]


def test_two_clients_that_ask_at_once_share_one_build(aeolian, tmp_path):
    source = """
    import modal, sys

    app = modal.App.lookup("together", create_if_missing=True)
    image = modal.Image.debian_slim().run_commands("sleep 2; date +%s%N > /opt/when; echo a single build")
    built = image.build(app)
    print("id", built.object_id)
    """
    (tmp_path / "program.py").write_text("\n".join(line[4:] for line in source.splitlines()))
    programs = [aeolian.start_command(sys.executable, "program.py", cwd=tmp_path) for _ in range(2)]
    outputs = [program.communicate(timeout=300)[0] for program in programs]
    ids = {re.search(r"^id (im-\w+)", output, re.MULTILINE)[1] for output in outputs}
    assert len(ids) == 1
    layers = subprocess.run(
        ["find", str(aeolian.data_dir / "layers"), "-path", "*/opt/when"], capture_output=True, text=True
    ).stdout.split()
    assert len(layers) == 1


def test_an_image_is_published_found_by_name_and_by_id_and_deleted(aeolian, tmp_path):
    output = aeolian.python(
        """
        import modal

        app = modal.App.lookup("published", create_if_missing=True)
        image = modal.Image.debian_slim().run_commands("echo version one > /opt/version").build(app)
        image.publish("tools:one")

        def version():
            return open("/opt/version").read().strip()

        for found in (modal.Image.from_name("tools:one"), modal.Image.from_id(image.object_id)):
            with modal.App("reader").run() as _:
                pass
            reader = modal.App("reader")
            function = reader.function(image=found, serialized=True)(version)
            with reader.run():
                print("read", function.remote())
        """,
        tmp_path,
        timeout_s=400,
    )
    assert output.count("read version one") == 2
    assert "tools" in aeolian.modal("image", "names", "list")
    aeolian.modal("image", "names", "delete", "tools:one", "--yes")
    assert "tools" not in aeolian.modal("image", "names", "list")


def test_projects_are_installed_from_their_own_files(aeolian, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "thing"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["six==1.16.0"]\n'
    )
    (tmp_path / "Dockerfile").write_text(
        "FROM python:3.11-slim-bookworm AS made\nARG WHO=nobody\nRUN echo made for $WHO > /made\n"
        "FROM python:3.11-slim-bookworm\nCOPY --from=made /made /opt/made\nCOPY pyproject.toml /opt/\n"
        'ENV FROM_FILE="yes it is"\nENTRYPOINT []\n'
    )
    output = aeolian.run_app(
        """
        import modal

        app = modal.App("projects")
        by_pip = modal.Image.debian_slim(python_version="3.11").pip_install_from_pyproject("pyproject.toml")
        by_uv = modal.Image.debian_slim(python_version="3.11").uv_sync(frozen=False)
        by_file = modal.Image.from_dockerfile("Dockerfile", build_args={"WHO": "you"})

        @app.function(image=by_pip, serialized=False)
        def pip_version():
            import six

            return six.__version__

        @app.function(image=by_uv)
        def uv_version():
            import six

            return six.__version__, six.__file__

        @app.function(image=by_file)
        def made():
            import os

            return open("/opt/made").read().strip(), os.environ["FROM_FILE"], os.path.exists("/opt/pyproject.toml")

        @app.local_entrypoint()
        def main():
            assert pip_version.remote() == "1.16.0"
            version, path = uv_version.remote()
            assert version == "1.16.0" and path.startswith("/.uv/"), path
            assert made.remote() == ("made for you", "yes it is", True)
            print("all is well")
        """,
        tmp_path,
        timeout_s=580,
    )
    assert "all is well" in output
