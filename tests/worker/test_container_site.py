import shutil
import subprocess
import sys

from aeolian.worker import container_site

RAISES = """
import pickle, sys
from modal import _serialization

class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no")

def raised(*errors):
    cause = None
    for error in errors:
        try:
            raise error from cause
        except Exception as caught:
            cause = caught
    return cause

def sent(error):
    return pickle.loads(_serialization.pickle_exception(error))

error = sent(raised(KeyError("a"), TypeError("b"), ValueError("c")))
assert (type(error.__cause__), type(error.__cause__.__cause__)) == (TypeError, KeyError), error.__cause__
assert error.__suppress_context__
assert sent(ValueError("alone")).__cause__ is None
assert sent(raised(Unpicklable(), ValueError("c"))).args == ("c",)
loop = ValueError("it causes itself")
loop.__cause__ = loop
assert sent(loop).args == ("it causes itself",)
assert "/__modal/deps" == sys.path[-1]
print("all is well")
"""


def test_an_exception_keeps_its_causes_on_the_way_to_the_caller(tmp_path):
    shutil.copyfile(container_site.__file__, tmp_path / "sitecustomize.py")
    done = subprocess.run(
        [sys.executable, "-c", RAISES], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "all is well\n", done.stderr


ADDRESS = """
from modal._runtime import asgi
print(asgi.get_ip_address(b"lo"), asgi.get_ip_address(b"no-such-one"))
"""


def test_a_web_server_is_looked_for_on_the_loopback_where_there_is_no_eth0(tmp_path):
    shutil.copyfile(container_site.__file__, tmp_path / "sitecustomize.py")
    done = subprocess.run(
        [sys.executable, "-c", ADDRESS], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "127.0.0.1 127.0.0.1\n", done.stderr
