"""Which part of the network each node of an exported file belongs to, written into the nodes' names for a profile."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from pathlib import Path

from efficientformer.export.proto import INPUT, OUTPUT
from efficientformer.latency.graph import network_proto
from efficientformer.runtime.manifests import parse_manifest
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import EngineError, missing_extra
from efficientformer.spec.manifest import METADATA_KEY

PART = re.compile(r"(stem|stages\.\d+\.(?:embedding|blocks\.\d+)|norm|head)/")
_ADDED = {"QuantizeLinear", "DequantizeLinear", "Cast"}  # by quantisation and half storage, between our nodes


def part_in(text: str) -> str:
    """Return the first part named in an engine's name of a node, or ""."""
    found = PART.search(text)
    return found.group(1) if found else ""


def name_nodes(source: Path, target: Path) -> ArchSpec:
    """Copy an exported file with every node and every tensor between nodes named after its part.

    The graph of the file's spec has the same operators in the same order (see ``latency.graph``), named; the nodes of
    the file are given these names, operator by operator. Quantisation in between goes by what it quantises.

    Args:
        source: An exported file.
        target: The copy.

    Raises:
        MissingExtraError: If onnx is not installed.
        EngineError: If it is no exported file, or not one this version understands.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("torch", "A profile by blocks", error) from error
    try:
        proto = onnx.load(source)
    except Exception as error:  # protobuf's errors have no public base class
        raise EngineError(f"Cannot read {source}", expected="an exported .onnx file", found=str(error)[:200]) from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    spec = parse_manifest(source, metadata.get(METADATA_KEY)).spec
    known: dict[str, deque[str]] = defaultdict(deque)
    for node in network_proto(spec).graph.node:
        known[node.op_type].append(node.name)
    found = Counter(node.op_type for node in proto.graph.node if node.op_type not in _ADDED)
    _check_operators(source, found, Counter({kind: len(names) for kind, names in known.items()}))
    renamed = {INPUT: INPUT, OUTPUT: OUTPUT}
    for node in proto.graph.node:
        if node.op_type not in _ADDED:
            node.name = known[node.op_type].popleft()
            renamed |= {tensor: f"{node.name}:{i}" for i, tensor in enumerate(node.output) if tensor not in renamed}
    for node in proto.graph.node:
        if node.op_type in _ADDED:
            near = next((renamed[tensor] for tensor in node.input if tensor in renamed), "")
            node.name = f"{part_in(near)}/{node.op_type}:{node.output[0]}" if part_in(near) else node.name
            if part_in(near):
                renamed |= {tensor: f"{node.name}:{i}" for i, tensor in enumerate(node.output) if tensor not in renamed}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    onnx.save(proto, target)
    return spec


def _check_operators(source: Path, found: Counter[str], expected: Counter[str]) -> None:
    """Check that a file has as many operators of each kind as its network.

    Raises:
        EngineError: If it has not.
    """
    for kind in found | expected:
        if found[kind] != expected[kind]:
            raise EngineError(
                f"{source} has other operators than the network in its manifest",
                expected=f"{expected[kind]} {kind}",
                found=f"{found[kind]}",
                hint="Export it again with this version: efficientformer convert CHECKPOINT FILE.onnx",
            )
