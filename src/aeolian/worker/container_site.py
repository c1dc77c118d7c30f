"""What Python runs first in every container: `/pkg/sitecustomize.py`. Standard library only, Python 3.9 and newer.

The SDK's dependencies come last on the path, so that packages of the image win. And an exception that a Function
raises keeps its cause on the way to the caller: the SDK pickles it, and pickled exceptions forget `__cause__`.
"""

import sys
from importlib.machinery import PathFinder

DEPENDENCIES = "/__modal/deps"


class KeepCauses:
    """Finds the SDK's module that pickles exceptions, once, and changes how it does."""

    def find_spec(self, name, path=None, target=None):
        if name != "modal._serialization":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                pickle_exception = getattr(module, "pickle_exception", None)
                if pickle_exception is not None:
                    module.pickle_exception = lambda error: pickle_exception(with_causes(error, module.serialize))

            spec.loader.exec_module = exec_module
        return spec


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
    sys.meta_path.insert(0, KeepCauses())
