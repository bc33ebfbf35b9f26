"""A method from a file of the user: ``FILE.py:NAME``."""

import sys
import traceback
from pathlib import Path
from types import ModuleType

from config import InputError


def load_method(place: str) -> object:
    """What FILE.py calls NAME, after the file was run: as it is now, whatever was loaded of it before.

    The file can import modules that lie beside it.

    Args:
        place: "FILE.py:NAME".

    Raises:
        InputError: no such file, no such name in it, or an error while it runs.
    """
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"There is no file '{file}' to take the method '{name}' from.")
    module = ModuleType(str(path))  # by its path: methods of one name in two files are told apart
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(path.read_bytes(), module.__file__, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise InputError(f"'{file}' cannot be imported: {_words(error, module.__file__)}.") from error
    if name not in vars(module):
        raise InputError(f"'{file}' has no '{name}'.")
    return vars(module)[name]


def _words(error: BaseException, file: str) -> str:
    """Type, text and line of an error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
    return f"{text} (line {lines[-1]})" if lines else text
