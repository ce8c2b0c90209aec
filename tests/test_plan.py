"""Plans mean one thing or are refused, with the place, the value and the way out on one line."""

import os
import subprocess
import sys

import pytest

from dax.errors import DaxError
from dax.plan import DEFAULT_PRESET, Plan, parse_set, plan_layer, presets


def refused(text: str, make) -> str:
    """The message of the DaxError("bad_request") that make() must raise; it holds `text` and is one line."""
    with pytest.raises(DaxError) as caught:
        make()
    message = str(caught.value)
    assert caught.value.exit_code == 2 and text in message and "\n" not in message, message
    return message


@pytest.fixture
def plan_file(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "plan.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_the_default_is_exact():
    assert Plan() == Plan.load(DEFAULT_PRESET) and DEFAULT_PRESET in presets()
    assert Plan().leaves().items() >= {"attention.kernel": "auto", "compile": "none", "cache.policy": "none"}.items()
    assert Plan().blocks.fused and not Plan().linear.active


@pytest.mark.parametrize("preset", presets())
def test_presets_load_and_survive_a_file(preset, tmp_path):
    plan = Plan.load(preset)
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again == plan and again.hash() == plan.hash() and hash(again) == hash(plan)


def test_a_plan_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Plan().compile = "blocks"


def test_hash_tells_plans_apart_and_ignores_the_run():
    code = "import dax; print(dax.Plan().hash())"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert other.stdout.strip() == Plan().hash() != Plan(compile="blocks").hash()


def test_later_layers_win_and_every_leaf_knows_its_source(plan_file):
    path = plan_file("attention:\n  kernel: sdpa\ncompile: blocks\n")
    plan, sources = Plan.from_layers(
        [plan_layer("exact"), plan_layer(path), ("--set compile=none", parse_set("compile=none"))]
    )
    assert plan.leaves().items() >= {"attention.kernel": "sdpa", "compile": "none"}.items()
    assert sources.items() >= {"attention.kernel": f"file {path}", "compile": "--set compile=none"}.items()


def test_fused_blocks_and_compile_exclude_each_other(plan_file):
    path = plan_file("compile: blocks\nblocks:\n  fused: true\n")
    with pytest.raises(DaxError, match="compile = blocks and blocks.fused = true"):
        Plan.from_layers([plan_layer(path)])
    higher, sources = Plan.from_layers([plan_layer("exact"), ("--set", {"compile": "blocks"})])
    assert (higher.compile, higher.blocks.fused, sources["blocks.fused"]) == ("blocks", False, "--set")
    lower, _ = Plan.from_layers([("file", {"compile": "blocks"}), ("--set", {"blocks.fused": True})])
    assert (lower.compile, lower.blocks.fused) == ("none", True)


def test_static_scales_are_never_per_token_nor_of_weights_alone():
    static = {"linear.activation": "static", "linear.scheme": "int8"}
    with pytest.raises(DaxError, match="linear.activation = static: one scale"):
        Plan.from_layers([("file", static)])
    static["linear.granularity"] = "tensor"
    for weight_only in ({"linear.scheme": "int8_weight_only"}, {"linear.rules": {"blocks.0": "int8_weight_only"}}):
        with pytest.raises(DaxError, match="int8_weight_only leaves activations as they are"):
            Plan.from_layers([("file", static | weight_only)])
    assert Plan.from_layers([("file", static)])[0].linear.activation == "static"


def test_rules_are_a_mapping_of_words(plan_file):
    plan = Plan.load(plan_file("linear:\n  scheme: int8\n  rules:\n    blocks.0: none\n    blocks.1.ffn: fp8\n"))
    assert plan.linear.rules == {"blocks.0": "none", "blocks.1.ffn": "fp8"}
    assert plan.linear.schemes == ("int8", "fp8") and plan.linear.active
    sets = [("--set", parse_set(f"linear.rules.{text}")) for text in ("blocks.0=fp8", "proj_out=none")]
    merged, _ = Plan.from_layers([("plan", plan.leaves()), *sets])
    assert merged.linear.rules == {"blocks.0": "fp8", "blocks.1.ffn": "fp8", "proj_out": "none"}
    with pytest.raises(DaxError, match="rules.*valid string"):
        Plan.from_layers([("--set", parse_set("linear.rules.blocks.0=3"))])


def test_dotted_and_nested_keys_are_equal():
    nested, _ = Plan.from_layers([("a", {"attention": {"kernel": "sdpa"}})])
    dotted, _ = Plan.from_layers([("a", {"attention.kernel": "sdpa"})])
    assert nested == dotted


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("did you mean 'attention.kernel'", {"attention.kernal": "sdpa"}),
        ("did you mean 'compile'", {"compil": "none"}),
        ("unknown plan key 'qaunt'", {"qaunt": "int8"}),
        ("did you mean 'sage'", {"attention": {"kernel": "saeg"}}),
        ("did you mean 'blocks'", {"compile": "block"}),
        ("'attention' is a group of keys: write attention.kernel", {"attention": "sdpa"}),
        ("compile = True is not known", {"compile": True}),
        ("compile = ['none'] is not known", {"compile": ["none"]}),
        ("attention.kernel = 'SDPA' is not known", {"attention.kernel": "SDPA"}),
        ("unknown plan key 'compile.mode'", {"compile": {"mode": "none"}}),
        ("a plan is a mapping", ["compile"]),
    ],
)
def test_unknown_keys_and_values(text, values):
    assert refused(text, lambda: Plan.from_layers([("--set", values)])).startswith("--set")


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("text", "name"),
    [("did you mean 'exact'", "exakt"), ("unknown plan 'quick'", "quick")],
)
def test_unknown_presets(text, name):
    refused(text, lambda: Plan.load(name))


@pytest.mark.fault(16)
@pytest.mark.parametrize("text", ["compile", "=none", "compile=", "", "compile = "])
def test_malformed_set(text):
    refused(f"--set {text!r}: write it as key=value", lambda: parse_set(text))


@pytest.mark.fault(16)
def test_ambiguous_set():
    refused("--set compile=yes: 'yes' is ambiguous", lambda: parse_set("compile=yes"))


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("line 2: duplicate key 'compile', first on line 1", "compile: none\ncompile: blocks\n"),
        ("line 3: duplicate key 'kernel'", "attention:\n  kernel: sdpa\n  kernel: sdpa\n"),
        ("line 1: 'no' is ambiguous", "compile: no\n"),
        ("line 2: '.nan' is ambiguous", "# a comment\ncompile: .nan\n"),
        ("line 1: no value", "compile:\n"),
        ("line 2", "attention:\n\tkernel: sdpa\n"),
        ("line 1: the tag", "compile: !!python/object/apply:os.system ['true']\n"),
        ("line 1: the tag", "!!map\ncompile: none\n"),
        ("line 1: anchors and aliases", "compile: &a none\n"),
        ("line 1: a list", "- compile\n"),
        ("line 1: a list", "[[[[[[[[[[\n"),
        ("line 1: a plan is a mapping", "compile\n"),
        ("line 2: a second document", "compile: none\n--- \ncompile: blocks\n"),
        ("line 1: nested deeper", "{a: " * 20 + "b" + "}" * 20),
        ("line 1: a key must be a word", "? {a: b}\n: c\n"),
        ("the file is empty", ""),
        ("the file is empty", "# only a comment\n"),
        ("line 2: not UTF-8", b"compile: none\n\xff\xfe\n"),
        ("plan", b"\x00\x01\x02"),
        ("larger than 64 KiB", b"# " + b"x" * 70_000),
    ],
)
def test_bad_yaml(where, content, plan_file):
    path = plan_file(content)
    assert str(path) in refused(where, lambda: Plan.load(path))


@pytest.mark.fault(17)
def test_an_anchor_bomb_is_refused_at_once(plan_file):
    lines = ["a0: &a0 {x: y}"] + [f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 60)]
    refused("anchors and aliases", lambda: Plan.load(plan_file("\n".join(lines))))


@pytest.mark.fault(17)
@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5", 5), (".5", 0.5), ("true", True), ("sdpa", "sdpa")])
def test_scalars_are_yaml_1_2(text, value):
    read = parse_set(f"key={text}")["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.fault(18)
def test_one_source_that_contradicts_itself():
    values = {"attention": {"kernel": "sdpa"}, "attention.kernel": "cudnn"}
    message = refused("sets attention.kernel to both", lambda: Plan.from_layers([("file x", values)]))
    assert "'sdpa'" in message and "'cudnn'" in message
    twice = [("--set", {"compile": "none"}), ("--set", {"compile": "blocks"})]
    refused("sets compile to both", lambda: Plan.from_layers(twice))


@pytest.mark.fault(22)
def test_paths_that_are_no_plan_file(tmp_path):
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    locked = tmp_path / "locked.yaml"
    locked.write_text("compile: none\n")
    locked.chmod(0)
    refused("No such file", lambda: Plan.load(tmp_path / "missing.yaml"))
    refused("No such file", lambda: Plan.load("missing.yaml"))
    refused("a folder", lambda: Plan.load(tmp_path))
    refused("not a regular file", lambda: Plan.load(fifo))
    refused("symbolic links", lambda: Plan.load(loop))
    refused("plan", lambda: Plan.load("a\0b/c.yaml"))
    if os.geteuid() != 0:
        refused("Permission denied", lambda: Plan.load(locked))


def test_save_names_what_it_cannot_write(tmp_path):
    with pytest.raises(DaxError, match="No such file") as caught:
        Plan().save(tmp_path / "missing" / "plan.yaml")
    assert caught.value.exit_code == 6


def test_the_parallel_part_takes_one_word_or_numbers():
    layers = [("file a", {"parallel": {"cfg": 2, "ulysses": 4}}), ("--set", {"parallel": "auto"})]
    plan, sources = Plan.from_layers(layers)
    assert plan.parallel == Plan().parallel and sources["parallel.cfg"] == "--set"
    wrong = {"cfg": 3, "ulysses": 0, "rows": 1.5, "overlap": "x", "wire": "9bit", "vae": True}
    for key, value in wrong.items():
        with pytest.raises(DaxError, match=f"--set: parallel.{key} = {value!r}"):
            Plan.from_layers([("--set", {f"parallel.{key}": value})])
