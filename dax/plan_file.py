"""Plan files: the part of YAML that means one thing.

Mappings and plain scalars only, with YAML 1.2 scalars (so `1e-3` is a number and `no` is refused, not false).
Duplicate keys, anchors, tags, several documents, deep nesting and large or non-text files are refused with their line.
"""

import re
import stat
from pathlib import Path
from typing import Any

from dax.errors import DaxError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")
AMBIGUOUS = re.compile(r"(yes|no|on|off|y|n|[-+]?\.(inf|nan)|nan|inf|[-+]?0[0-9_]+|0[xob].*|[0-9]+(:[0-9]+)+)$", re.I)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a plan file. DaxError("bad_request") with file and line for whatever is not plainly one."""
    text = read_text(path)
    import yaml

    try:
        check_events(yaml.parse(text, Loader=yaml.SafeLoader), path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise DaxError("bad_request", f"plan {path}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # an unprintable character
        raise DaxError("bad_request", f"plan {path}: {str(error).splitlines()[0]}") from None
    if node is None:
        raise DaxError("bad_request", f"plan {path}: the file is empty; write for example `compile: none`")
    if not isinstance(node, yaml.MappingNode):
        raise DaxError("bad_request", f"plan {path} line {node.start_mark.line + 1}: a plan is a mapping of keys")
    return build(node, str(path))


def read_text(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise DaxError("bad_request", f"plan {path}: {kind}; give a YAML file or a preset")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DaxError("bad_request", f"plan {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise DaxError("bad_request", f"plan {path}: larger than {MAX_BYTES // 1024} KiB, so not a plan")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DaxError("bad_request", f"plan {path} line {line}: not UTF-8 text") from None


def check_events(events, path: Path) -> None:
    """Refuse anchors, aliases, tags, sequences, a second document and deep nesting before anything is built."""
    import yaml

    depth = documents = 0
    for event in events:
        where = f"plan {path} line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise DaxError("bad_request", f"{where}: anchors and aliases are not allowed in a plan")
        if getattr(event, "tag", None):
            raise DaxError("bad_request", f"{where}: the tag {event.tag!r} is not allowed in a plan")
        if isinstance(event, yaml.SequenceStartEvent):
            raise DaxError("bad_request", f"{where}: a list; a plan is a mapping of keys")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise DaxError("bad_request", f"{where}: a second document; a plan is one")
        depth += isinstance(event, yaml.MappingStartEvent) - isinstance(event, yaml.MappingEndEvent)
        if depth > MAX_DEPTH:
            raise DaxError("bad_request", f"{where}: nested deeper than {MAX_DEPTH}")


def build(node, path: str) -> dict[str, Any]:
    import yaml

    mapping: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"plan {path} line {line}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise DaxError("bad_request", f"{where}: a key must be a word")
        key = key_node.value
        if key in mapping:
            raise DaxError("bad_request", f"{where}: duplicate key {key!r}, first on line {lines[key]}")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            mapping[key] = build(value_node, path)
        elif value_node.style in ("'", '"', "|", ">"):
            mapping[key] = value_node.value
        else:
            mapping[key] = parse_scalar(value_node.value, where)
    return mapping


def parse_scalar(text: str, where: str) -> Any:
    """A YAML 1.2 plain scalar: true, false, whole or decimal number, text. What 1.1 reads otherwise is refused."""
    if text in ("", "~", "null", "Null", "NULL"):
        raise DaxError("bad_request", f"{where}: no value")
    if text in ("true", "false"):
        return text == "true"
    if INTEGER.match(text):
        return int(text[:64]) if len(text) <= 64 else text
    if FLOAT.match(text):
        return float(text)
    if AMBIGUOUS.match(text):
        raise DaxError(
            "bad_request", f"{where}: {text!r} is ambiguous; write true, false, a plain number or a quoted text"
        )
    return text
