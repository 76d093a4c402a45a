"""Documentation of the standard library in the running interpreter: objects, signatures,
docstrings.

The demo's chats ask about it. The cost of reading the interpreter instead of shipping a corpus: the
text differs between Python versions, and so do the demo's results.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Pure-Python modules with good docstrings, importable without side effects on every platform.
MODULES = (
    "abc argparse array ast asyncio.events asyncio.locks asyncio.queues asyncio.streams "
    "asyncio.tasks base64 bdb bisect bz2 calendar cmath cmd code codecs collections colorsys "
    "concurrent.futures configparser contextlib copy csv datetime decimal difflib dis doctest "
    "email.message email.utils enum filecmp fileinput fnmatch fractions ftplib functools "
    "gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies "
    "http.server imaplib importlib.util inspect io ipaddress itertools json keyword linecache "
    "locale logging logging.handlers lzma mailbox math mimetypes multiprocessing.pool "
    "multiprocessing.managers netrc numbers operator optparse os os.path pathlib pdb pickle "
    "pickletools pkgutil platform plistlib poplib pprint profile pstats queue quopri random re "
    "reprlib sched secrets selectors shelve shlex shutil signal site smtplib socket "
    "socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys "
    "sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace traceback "
    "tracemalloc types typing unicodedata unittest unittest.case unittest.mock urllib.error "
    "urllib.parse urllib.request uuid warnings wave weakref wsgiref.util xml.dom.minidom "
    "xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zlib"
).split()
# Folders next to the library's modules, and those of its tests.
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "pydoc_data", "test"}
TESTS = {"test", "tests", "idle_test"}
MIN_CHARACTERS = 80  # shortest docstring to train on
# A default such as `<function f at 0x7f…>` changes at every start of the interpreter.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Entry:
    """One documented object of the library."""

    name: str
    """Qualified name, `json.dumps`."""
    kind: str
    """`function`, `class` or `method`."""
    signature: inspect.Signature | None
    """None if the interpreter gives none (many built-ins)."""
    docstring: str
    """Cleaned by `inspect.cleandoc`, never empty."""

    @property
    def summary(self) -> str:
        """The docstring's first paragraph on one line."""
        return " ".join(self.docstring.split("\n\n", 1)[0].split())

    @property
    def call(self) -> str | None:
        """`json.dumps(obj, *, skipkeys=False)`; None without a signature."""
        if self.signature is None:
            return None
        return ADDRESS.sub("", f"{self.name}{self.signature}")


def modules() -> list[ModuleType]:
    """Import the modules of `MODULES` that this interpreter has."""
    found = []
    for name in MODULES:
        try:
            found.append(importlib.import_module(name))
        except ImportError:  # an interpreter built without _bz2, _lzma, _sqlite3, _ssl …
            continue
    return found


def entries() -> list[Entry]:
    """Return all documented public functions, classes and methods, by name, each docstring once."""
    by_name: dict[str, Entry] = {}
    for module in modules():
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(member):
                _add(by_name, f"{module.__name__}.{name}", "class", member)
                for method_name, method in sorted(vars(member).items()):
                    if not method_name.startswith("_") and callable(method):
                        _add(by_name, f"{module.__name__}.{name}.{method_name}", "method", method)
            elif callable(member):
                _add(by_name, f"{module.__name__}.{name}", "function", member)
    first_of: dict[str, Entry] = {}
    for _, entry in sorted(by_name.items()):
        first_of.setdefault(entry.docstring, entry)
    return list(first_of.values())


def member(name: str) -> Any:
    """Return the object with an entry's name.

    Raises:
        LookupError: there is none.
    """
    parts = name.split(".")
    for n_module_parts in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n_module_parts]))
        except ImportError:
            continue
        try:
            for part in parts[n_module_parts:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise LookupError(f"{name}: the standard library has no such object")


def source(name: str) -> str | None:
    """Return the source of a function or method, not indented.

    Returns:
        None if there is no source: the object is built in, or shipped without it.
    """
    try:
        return textwrap.dedent(inspect.getsource(member(name))).strip()
    except (LookupError, OSError, TypeError):
        return None


def _add(by_name: dict[str, Entry], name: str, kind: str, member: object) -> None:
    documentation = getattr(member, "__doc__", None)
    if not isinstance(documentation, str) or not documentation.strip():
        return
    docstring = ADDRESS.sub("", inspect.cleandoc(documentation)).strip()
    try:
        signature = inspect.signature(member) if callable(member) else None
    except (ValueError, TypeError):
        signature = None
    by_name[name] = Entry(name, kind, signature, docstring)


def module_sources() -> list[str]:
    """Return the source of each module that has one, in the order of `MODULES`."""
    texts = []
    for module in modules():
        try:
            texts.append(inspect.getsource(module))
        except (OSError, TypeError):  # built in, or shipped without source
            continue
    return texts


def unlisted_docstrings() -> list[str]:
    """Return docstrings of packages that `MODULES` does not name, each once, in file order.

    No chat of the demo is about them. They are read from the source files; nothing is imported.
    Their number depends on the installation: some distributions leave out `tkinter` or `idlelib`.
    """
    listed = {name.partition(".")[0] for name in MODULES}
    asked_about = {entry.docstring for entry in entries()}
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        folder, *_ = parts = path.relative_to(library).with_suffix("").parts
        if folder in listed | NOT_THE_LIBRARY or folder.startswith("_") or TESTS & set(parts):
            continue
        for docstring in _docstrings(path):
            if len(docstring) >= MIN_CHARACTERS and docstring not in asked_about:
                found[docstring] = None
    return list(found)


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and tests of the parser
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]
