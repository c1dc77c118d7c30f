"""Containers that start from a prepared state are what any other container is, driven by the official client."""

import uuid

APP = """
    import os, socket, sys, time
    import modal

    app = modal.App("cold-UNIQUE")
    volume = modal.Volume.from_name("cold-UNIQUE", create_if_missing=True)
    secret = modal.Secret.from_dict({"TOKEN": "of UNIQUE"})

    def seen():
        with open("/proc/self/cmdline") as stream:
            is_prepared = "standby_main" in stream.read()
        with open("/proc/self/status") as stream:
            status = dict(line.split(":\\t", 1) for line in stream.read().splitlines())
        with open("/proc/self/mountinfo") as stream:
            mounts = sorted({line.split()[4] for line in stream if "/__modal/volumes/" not in line})
        return {
            "is_prepared": is_prepared, "seed": hash("seed"), "task": os.environ["MODAL_TASK_ID"],
            "same": {
                "path": sys.path, "argv": sys.argv, "cwd": os.getcwd(), "modal": modal.__file__,
                "names": sorted(os.environ), "token": os.environ.get("TOKEN"), "mounts": mounts,
                "rights": [status[name] for name in ("CapEff", "CapBnd", "Seccomp", "NoNewPrivs")],
                "main": sys.modules["__main__"].__file__, "files": sorted(os.listdir("/root")),
                "processes": sum(name.isdigit() for name in os.listdir("/proc")),
                "resolver": open("/etc/resolv.conf").read(),
            },
            "is_own_name": socket.gethostname() == os.environ["MODAL_TASK_ID"],
        }

    @app.function(secrets=[secret], volumes={"/data": volume}, single_use_containers=True)
    def look():
        count = len(os.listdir("/data"))
        with open(f"/data/{count}", "w") as stream:
            stream.write("x")
        volume.commit()
        return {**seen(), "count": count}

    @app.function(memory=(64, 160), single_use_containers=True, retries=0)
    def take_too_much():
        held = []
        while True:
            held.append(bytearray(b"x") * (1 << 20))

    if __name__ == "__main__":
        with app.run():
            found = [look.remote()]
            until = time.monotonic() + 60
            while sum(it["is_prepared"] for it in found) < NUM_PREPARED and time.monotonic() < until:
                time.sleep(0.5)
                found.append(look.remote())
            assert [it["count"] for it in found] == list(range(len(found))), found
            assert all(it["same"] == found[0]["same"] for it in found), [it["same"] for it in found]
            assert len({it["task"] for it in found}) == len(found)
            if NUM_PREPARED:
                assert sum(it["is_prepared"] for it in found) >= NUM_PREPARED, len(found)
                assert len({it["seed"] for it in found}) == len(found), "no two share a hash seed"
                assert all(it["is_own_name"] for it in found)
                try:
                    take_too_much.remote()
                except Exception as error:
                    assert "memory" in str(error).lower(), repr(error)
                else:
                    raise AssertionError("it was not limited")
            print("all is well")
"""


def test_containers_started_ahead_see_what_a_cold_one_sees(aeolian, tmp_path):
    """Only `native` has some."""
    num_prepared = "2" if aeolian.runtime == "native" else "0"
    program = APP.replace("UNIQUE", uuid.uuid4().hex[:8]).replace("NUM_PREPARED", num_prepared)
    assert "all is well" in aeolian.python(program, tmp_path)
