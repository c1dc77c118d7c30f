"""What Python runs first in every container: `/pkg/sitecustomize.py`. Standard library only, Python 3.9 and newer.

The SDK's dependencies come last on the path, so that packages of the image win. And an exception that a Function
raises keeps its cause on the way to the caller: the SDK pickles it, and pickled exceptions forget `__cause__`.
A `web_server` is found where there is no `eth0`: containers that share the host's network find it on the loopback.
"""

import sys
from importlib.machinery import PathFinder

DEPENDENCIES = "/__modal/deps"


class Change:
    """Finds one module of the SDK, once, and changes it when it has been executed."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.change(module)

            spec.loader.exec_module = exec_module
        return spec


def keep_causes(module):
    """Of `modal._serialization`."""
    pickle_exception = getattr(module, "pickle_exception", None)
    if pickle_exception is not None:
        module.pickle_exception = lambda error: pickle_exception(with_causes(error, module.serialize))


def find_an_address(module):
    """Of `modal._runtime.asgi`: it asks for the address of `eth0`, which hosts do not always have."""
    address_of = getattr(module, "get_ip_address", None)

    def get_ip_address(interface):
        try:
            return address_of(interface)
        except OSError:
            return "127.0.0.1"

    if address_of is not None:
        module.get_ip_address = get_ip_address


def with_causes(error, serialize):
    """What stands in an exception's `__dict__` is set when it is unpickled, also what Python keeps elsewhere."""
    chain, seen = [error], set()
    while chain[-1].__cause__ is not None and id(chain[-1]) not in seen:
        seen.add(id(chain[-1]))
        chain.append(chain[-1].__cause__)
    try:
        serialize(chain[1:])
    except Exception:
        return error  # a cause that cannot be pickled must not hide the exception itself
    for above in chain[:-1]:
        above.__dict__["__cause__"] = above.__cause__
    return error


if __name__ == "sitecustomize":
    sys.path.append(DEPENDENCIES)
    sys.meta_path.insert(0, Change("modal._serialization", keep_causes))
    sys.meta_path.insert(0, Change("modal._runtime.asgi", find_an_address))
