"""A function that a flag or a key names as MODULE:FUNCTION."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from dpo.errors import UserError


def imported(name: str, flag: str) -> Callable[..., Any]:
    """The function, from a module that Python finds: in the current folder first.

    Raises:
        UserError: no such module or function; `flag` is what named it.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{flag} {name}: {error}. Give a module in the current folder or installed, and a "
            "function in it."
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise UserError(f"{flag} {name}: got a {type(function).__name__}, wanted a function.")
    return function
