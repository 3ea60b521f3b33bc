"""The other process: loads torch_npu, then runs pickled calls until its input ends."""

from __future__ import annotations

import importlib
import operator
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection


def main(read: int, write: int) -> None:
    """Answer ((module, name), args, kwargs) with (True, result) or (False, (class name, traceback))."""
    import torch
    import torch_npu  # noqa: F401
    import torchair  # noqa: F401
    from torchair.core import _backend

    # Asking torch_npu for the current device needs one. torchair itself takes 0 where torch_npu is not loaded.
    _backend._cached_device_id = 0
    requests, answers = Connection(read, writable=False), Connection(write, readable=False)
    while True:
        try:
            request = requests.recv_bytes()
        except EOFError:
            break
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            (module, name), args, kwargs = pickle.loads(request)
            function = operator.attrgetter(name)(importlib.import_module(module))
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except Exception as error:
            answer = pickle.dumps((False, (type(error).__name__, traceback.format_exc())))
        answers.send_bytes(answer)
    sys.stdout.flush()
    # torchair closes its engine at exit, and there is none.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
