"""The manifest: what every checkpoint and every exported file carries about itself, as JSON in its own metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efficientformer.spec.arch import ArchSpec, load_json
from efficientformer.spec.errors import SpecError
from efficientformer.spec.fields import as_list, check_keys
from efficientformer.spec.preprocess import PreprocessSpec

METADATA_KEY = "efficientformer"  # the one entry of a file's metadata that holds the manifest


@dataclass(frozen=True)
class Manifest:
    """Architecture, preprocessing and labels of one set of weights, and where it comes from.

    Attributes:
        spec: The architecture.
        preprocess: The preprocessing its figures belong to.
        labels: Class names in order of the logits; empty if unknown.
        metrics: Measured figures, such as ``{"top1": 91.2}`` (percent).
        provenance: Where the weights come from: name, source, sha256 of the file, recipe, ...
    """

    spec: ArchSpec
    preprocess: PreprocessSpec
    labels: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = tuple(as_list("labels", self.labels, 1_000_000))
        object.__setattr__(self, "labels", labels)
        if not all(isinstance(label, str) for label in labels):
            raise SpecError("Illegal labels", expected="names", found="something that is not text")
        if labels and len(labels) != self.spec.num_classes:
            raise SpecError("Wrong number of labels", expected=f"{self.spec.num_classes}", found=f"{len(labels)}")
        if self.preprocess.input_size != self.spec.input_size:
            raise SpecError(
                "Preprocessing and network disagree",
                expected=f"input size {self.spec.input_size}",
                found=f"{self.preprocess.input_size}",
            )
        channels = len(self.preprocess.mean)
        if self.spec.in_chans in (1, 3) and channels != self.spec.in_chans:  # others take no pictures, but can be timed
            expected = f"{self.spec.in_chans} input channels"
            raise SpecError("Preprocessing and network disagree", expected=expected, found=f"{channels}")
        for name, values, kind in (("metrics", self.metrics, (int, float)), ("provenance", self.provenance, (str,))):
            fits = isinstance(values, Mapping) and all(
                isinstance(k, str) and isinstance(v, kind) for k, v in values.items()
            )
            if not fits:
                raise SpecError(
                    f"Illegal {name}", expected=f"names with {kind[0].__name__} values", found=repr(values)[:80]
                )

    def with_spec(self, spec: ArchSpec) -> Manifest:
        """Return the manifest of these weights in a changed network: what does not hold of it any more is left out.

        Raises:
            SpecError: If pictures cannot be prepared for it.
        """
        if spec == self.spec:
            return self
        preprocess = self.preprocess.with_input_size(spec.input_size)
        if spec.in_chans == 1:
            preprocess = preprocess.averaged()
        labels = self.labels if spec.num_classes == self.spec.num_classes else ()
        return dataclasses.replace(self, spec=spec, preprocess=preprocess, labels=labels, metrics={})

    def label(self, index: int) -> str:
        """Return the name of a class, or its number as text when names are unknown."""
        return self.labels[index] if self.labels else str(index)

    def to_json(self) -> str:
        """Return the manifest as JSON text; ``from_json`` gives the equal manifest back."""
        data = {
            "spec": self.spec.to_dict(),
            "preprocess": self.preprocess.to_dict(),
            "labels": self.labels,
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }
        return json.dumps(data)  # in ASCII: names of folders need not be UTF-8

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Build a manifest from JSON text, trusting nothing in it.

        Raises:
            SpecError: If the text is no JSON, has unknown fields, or its parts are illegal or disagree.
        """
        fields: dict[str, Any] = check_keys("the manifest", load_json("the manifest", text), cls)
        fields["spec"] = ArchSpec.from_dict(fields["spec"])
        fields["preprocess"] = PreprocessSpec.from_dict(fields["preprocess"])
        return cls(**fields)
