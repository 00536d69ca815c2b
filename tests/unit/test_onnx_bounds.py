"""Graphs that allocate or loop without measure, and say so in the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.errors import PolicyError, PublishError
from edge_agent.package import onnx_bounds, trust
from edge_agent.publishing import source
from tests.support.onnx_files import attribute, function, graph, message, model, node, number, tensor, varint
from tests.support.packages import make_package, manifest_of

pytestmark = pytest.mark.attack

LARGE = [1 << 20, 1 << 12]
BODY = attribute("body", message(6, graph([node("Add", ["a", "b"])])))


def loop(rounds: str = "m", condition: str = "") -> bytes:
    return node("Loop", [rounds, condition], ["y"], BODY)


def nested(levels: int, calls: int = 2) -> list[bytes]:
    """Functions that each call the one below so many times."""
    lowest = function("f0", [node("Add", ["a", "b"])])
    return [
        lowest,
        *(function(f"f{level}", [node(f"f{level - 1}", domain="own")] * calls) for level in range(1, levels)),
    ]


def inside(depth: int) -> bytes:
    found = node("Add", ["a", "b"])
    for _ in range(depth):
        found = node("If", ["c"], ["y"], attribute("then_branch", message(6, graph([found]))))
    return found


REFUSED = {
    "constant-of-shape": model([node("ConstantOfShape", ["s"])], [tensor("s", LARGE)]),
    "raw-shape": model([node("ConstantOfShape", ["s"])], [tensor("s", LARGE, raw=True)]),
    "shape-of-a-constant": model(
        [
            node("Constant", [], ["s"], attribute("value", message(5, tensor("", LARGE)))),
            node("ConstantOfShape", ["s"]),
        ]
    ),
    "shape-of-whole-numbers": model(
        [
            node("Constant", [], ["s"], attribute("value_ints", *(number(8, size) for size in LARGE))),
            node("ConstantOfShape", ["s"]),
        ]
    ),
    "shape-that-is-put-together": model(
        [
            node("Concat", ["a", "a"], ["ab"]),
            node("Mul", ["ab", "a"], ["abc"]),
            node("Cast", ["abc"], ["s"]),
            node("ConstantOfShape", ["s"]),
        ],
        [tensor("a", [1 << 10])],
    ),
    "many-of-them": model([node("ConstantOfShape", ["s"])] * 40, [tensor("s", [1 << 21])]),
    "expand": model([node("Expand", ["x", "s"])], [tensor("s", LARGE)]),
    "tile": model([node("Tile", ["x", "s"])], [tensor("s", LARGE)]),
    "range": model(
        [node("Range", ["z", "n", "o"])], [tensor("z", [0]), tensor("n", [1 << 40]), tensor("o", [1])]
    ),
    "random": model(
        [node("RandomNormal", [], ["y"], attribute("shape", *(number(8, size) for size in LARGE)))]
    ),
    "initialiser": model([node("Add", ["a", "a"])], [tensor("a", [], shape=[1 << 40])]),
    "initialisers-that-share": model(
        [node("Add")], [tensor(f"a{count}", [], shape=[1 << 12]) for count in range(40)]
    ),
    "dimensions": model([node("Add")], [tensor("a", [], shape=[1] * 100)]),
    "sparse": model(
        [node("Constant", [], ["y"], attribute("sparse_value", message(22, number(3, 1 << 40))))]
    ),
    "loop": model([loop()], [tensor("m", [1 << 62])]),
    "loop-without-number": model([loop("")]),
    "loop-of-a-computed-number": model([node("Shape", ["x"], ["m"]), loop()]),
    "loop-in-a-loop": model(
        [node("Loop", ["m", ""], ["y"], attribute("body", message(6, graph([loop()]))))],
        [tensor("m", [5000])],
    ),
    "loop-in-a-function": model(
        [node("f", domain="own")],
        functions=[
            function(
                "f",
                [node("Constant", [], ["m"], attribute("value_int", number(3, 1 << 62))), loop()],
            )
        ],
    ),
    "functions": model([node("f29", domain="own")], functions=nested(30)),
    "constants-in-functions": model(
        [node("f9", domain="own")],
        functions=[
            function(
                "f0",
                [
                    node("Constant", [], ["s"], attribute("value_int", number(3, 1 << 20))),
                    node("ConstantOfShape", ["s"]),
                ],
            ),
            *nested(10)[1:],
        ],
    ),
    "a-function-that-calls-itself": model(
        [node("f", domain="own")], functions=[function("f", [node("f", domain="own")])]
    ),
    "functions-in-a-chain": model([node("f99", domain="own")], functions=nested(100, calls=1)),
    "graphs-in-graphs": model([inside(20)]),
    "two-graphs": model([node("Add")]) + message(7, graph([loop()])),
    "another-wire-type-first": model([number(4, 7) + node("ConstantOfShape", ["s"])], [tensor("s", LARGE)]),
    "a-group-first": varint(99 << 3 | 3)
    + number(7, 1)
    + varint(99 << 3 | 4)
    + model([node("ConstantOfShape", ["s"])], [tensor("s", LARGE)]),
    "not-utf-8": model([message(3, b"\xff") + node("ConstantOfShape", ["s"])], [tensor("s", LARGE)]),
    "the-last-kind-counts": model([message(4, "Add") + node("ConstantOfShape", ["s"])], [tensor("s", LARGE)]),
}
TAKEN = {
    "small": model([node("ConstantOfShape", ["s"])], [tensor("s", [1 << 10, 1 << 10])]),
    "computed": model([node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"])]),
    "loop": model([loop()], [tensor("m", [100])]),
    "functions": model([node("f9", domain="own")], functions=nested(10)),
    "graphs-in-graphs": model([inside(5)]),
    "nothing": model([]),
    "no-onnx": b"graph " * 100,
    "cut": model([node("Add")])[:-1],
    "empty": b"",
}


def check(folder: Path, data: bytes) -> None:
    file = folder / "model.onnx"
    file.write_bytes(data)
    onnx_bounds.check(file, "here/model.onnx", package_bytes=100_000)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolicyError, match=r"^'here/model\.onnx' has "):
        check(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_bounded_or_no_message_is_taken(tmp_path: Path, name: str) -> None:
    check(tmp_path, TAKEN[name])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes.fromhex("ca0100") * 10_001, "more than 10000 functions"),
        (model([], [b""] * 200_001), "more than 200000 initialisers"),
    ],
    ids=["functions", "initialisers"],
)
def test_parts_that_cost_more_than_their_bytes_are_counted(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        check(tmp_path, data)


@pytest.mark.parametrize("folder", ["edge_agent/demo/sample_model", "tests/models/swapped"])
def test_a_model_of_the_builder_is_taken(folder: str) -> None:
    place = Path(__file__).parents[2] / folder
    onnx_bounds.check(
        place / "model.onnx", "x", package_bytes=sum(path.stat().st_size for path in place.iterdir())
    )


@pytest.mark.parametrize("path", ["artifacts/model/model.onnx", "artifacts/other.ONNX"])
def test_the_policy_looks_at_every_graph(tmp_path: Path, path: str) -> None:
    make_package(tmp_path, trust.WRAPPER, {path: REFUSED["loop"]})
    with pytest.raises(PolicyError, match=r"has a 'Loop' that makes it more than"):
        trust.decide(tmp_path, manifest_of(tmp_path, "phi"), registered_name="phi")


def test_publish_looks_before_it_tries_the_model(tmp_path: Path, sample_model: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sample_model, folder)
    (folder / "model.onnx").write_bytes(REFUSED["loop"])
    with pytest.raises(PublishError, match=r"devices would refuse .*'model\.onnx' has a 'Loop'"):
        source.check_folder(folder)


def test_the_policy_looks_at_a_graph_of_another_name(tmp_path: Path) -> None:
    make_package(tmp_path, trust.WRAPPER, {"artifacts/model/decoder": REFUSED["loop"]})
    config = tmp_path / "artifacts/model/genai_config.json"
    config.write_text(config.read_text().replace("model.onnx", "decoder"))
    with pytest.raises(PolicyError, match=r"decoder' has a 'Loop'"):
        trust.decide(tmp_path, manifest_of(tmp_path, "phi"), registered_name="phi")
