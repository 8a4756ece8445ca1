"""Walk the standard library as it is installed here: what is public, and what its documentation says."""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from flows.quickstart.sentence import first_sentence, without_signature

# A literal list rather than sys.stdlib_module_names: importing a module runs it, and some of them open a
# browser, print a poem, need a display or warn that they are deprecated. Names that one version lacks are
# passed over.
MODULES = """
    abc argparse array ast asyncio atexit base64 bdb binascii bisect builtins bz2 calendar cmath cmd code
    codecs codeop collections collections.abc colorsys compileall concurrent.futures configparser contextlib
    contextvars copy copyreg csv dataclasses datetime decimal difflib dis doctest email.charset email.header
    email.message email.policy email.utils enum faulthandler filecmp fileinput fnmatch fractions ftplib
    functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http
    http.client http.cookiejar http.cookies http.server imaplib importlib importlib.abc importlib.machinery
    importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json keyword
    linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes mmap
    modulefinder multiprocessing multiprocessing.connection multiprocessing.managers multiprocessing.pool
    multiprocessing.shared_memory netrc numbers operator optparse os os.path pathlib pdb pickle pickletools
    pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr queue quopri random re reprlib
    runpy sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl
    stat statistics string struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap
    threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata
    unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings
    wave weakref wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate
    xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xmlrpc.client
    xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

# Readers look these methods up by name; the methods of all classes would drown the functions.
CLASSES_WITH_METHODS = """
    bytes dict float frozenset int list set str argparse.ArgumentParser collections.Counter
    collections.OrderedDict collections.deque concurrent.futures.Future configparser.ConfigParser
    configparser.RawConfigParser contextlib.ExitStack datetime.date datetime.datetime decimal.Decimal
    difflib.SequenceMatcher email.message.Message fractions.Fraction io.StringIO logging.Handler
    logging.Logger pathlib.Path pathlib.PurePath queue.Queue random.Random socket.socket string.Formatter
    subprocess.Popen tarfile.TarFile threading.Barrier threading.Condition threading.Event threading.Thread
    unittest.TestCase zipfile.ZipFile
"""

# Test runners, debuggers and consoles put their own functions here, so what is found depends on who calls.
_REPLACEABLE = frozenset({"breakpointhook", "displayhook", "excepthook", "set_trace", "showwarning", "unraisablehook"})
_LONGEST_SIGNATURE = 160


@dataclass(frozen=True)
class Parameter:
    """One parameter of a callable."""

    name: str
    required: bool


@dataclass(frozen=True)
class Entry:
    """One public function, class or method of the library."""

    module: str
    """Where it is imported from, such as `os.path`."""
    name: str
    """Its name inside the module, such as `join` or `Path.exists`."""
    kind: str
    """`function`, `class` or `method`."""
    signature: str
    """Its parameters in brackets without annotations, or nothing where Python does not know them."""
    parameters: tuple[Parameter, ...]
    """The same, one by one, without `self`; empty where unknown."""
    doc: str
    """The docstring without indentation and without a leading signature."""
    summary: str
    """The first sentence of the docstring as plain prose, or nothing where there is no usable one."""

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def home(self) -> str:
        """What a reader would look through to find it: the module, or the class of a method."""
        return self.path.rpartition(".")[0] if self.kind == "method" else self.module

    @property
    def path(self) -> str:
        """The name that a program would write, such as `os.path.join` or `len`."""
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


def walk() -> list[Entry]:
    """Return every documented public callable, sorted by its path, each object once."""
    found: dict[str, Entry] = {}
    seen: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module_name, module in _modules():
            for name, thing in _members(module_name, module):
                if id(thing) in seen:  # the same object under a second name: the first one keeps it
                    continue
                seen.add(id(thing))
                for entry in _entries(module_name, name, thing):
                    found[entry.path] = entry
    return [found[path] for path in sorted(found)]


def _modules() -> Iterator[tuple[str, ModuleType]]:
    for name in MODULES.split():
        try:
            yield name, importlib.import_module(name)
        except Exception:  # noqa: S112 - a module that this Python lacks or cannot load is simply not documented
            continue


def _members(module_name: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    declared = getattr(module, "__all__", None)
    for name in sorted(set(declared) if declared else vars(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or name in _REPLACEABLE or not callable(thing):
            continue
        home = getattr(thing, "__module__", None)
        own = home in {module_name, module.__name__, f"_{module_name}", None}
        # Without __all__, what a module imported for its own use is not its own.
        if own or (declared and str(home).partition(".")[0] in sys.stdlib_module_names):
            yield name, thing


def _entries(module_name: str, name: str, thing: object) -> Iterator[Entry]:
    if inspect.isclass(thing):
        yield from _entry(module_name, name, "class", thing)
        path = name if module_name == "builtins" else f"{module_name}.{name}"
        if path in CLASSES_WITH_METHODS.split():
            for attribute, member in sorted(vars(thing).items()):
                if not attribute.startswith("_") and inspect.isroutine(member):
                    yield from _entry(module_name, f"{name}.{attribute}", "method", getattr(thing, attribute))
    elif inspect.isroutine(thing):
        yield from _entry(module_name, name, "function", thing)


def _entry(module_name: str, name: str, kind: str, thing: object) -> Iterator[Entry]:
    doc = getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return
    signature, parameters = _signature(thing)
    # A dataclass or named tuple without a docstring of its own carries its signature as one.
    if kind == "class" and doc.startswith(f"{name}("):
        doc = without_signature(doc)
    text = without_signature(inspect.cleandoc(doc))
    if text:
        yield Entry(module_name, name, kind, signature, parameters, text, first_sentence(text))


def _signature(thing: object) -> tuple[str, tuple[Parameter, ...]]:
    try:
        found = inspect.signature(thing)  # type: ignore[arg-type]
        bare = [
            parameter.replace(annotation=inspect.Parameter.empty, default=_default(parameter.default))
            for parameter in found.parameters.values()
            if parameter.name not in {"self", "cls"}
        ]
        text = str(inspect.Signature(bare))
    except Exception:  # many built-in callables have none, and annotations may name what is not there
        return "", ()
    if len(text) > _LONGEST_SIGNATURE:
        return "", ()
    return text, tuple(
        Parameter(parameter.name, parameter.default is inspect.Parameter.empty)
        for parameter in bare
        if parameter.kind not in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    )


class _Dots:
    def __repr__(self) -> str:
        return "..."


def _default(value: object) -> object:
    """Put dots for what is not written the same in two runs, such as an address, a path or a set."""
    if value is inspect.Parameter.empty or value is None:
        return value
    simple = isinstance(value, int | float | str | bytes | tuple)
    return value if simple and not re.search(r"[/\\<{]", repr(value)) else _Dots()
