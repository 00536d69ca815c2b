"""The software bill of materials of a bundle: CycloneDX JSON, made from the wheels' own metadata.

Every wheel becomes a library with its digest, licence and package URL, and what it depends on. The document
says the same for the same wheels, down to its serial number. Source: CycloneDX 1.6; the core metadata
specification (Name, Version, License-Expression, Requires-Dist).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from packageurl import PackageURL
from wheels import Wheel

_MAX_LICENSE_CHARACTERS = 100
"""Some packages have the whole text where a name belongs."""


def make(
    root: Wheel, wheels: Sequence[Wheel], depends: dict[str, set[str]], *, arch: str, made_at_s: int
) -> str:
    """The document as text.

    Args:
        root: the agent's own wheel.
        wheels: everything that is in the bundle beside it, by file.
        depends: names of the packages that each package needs.

    Raises:
        ValueError: the result does not hold against the schema.
    """
    main = _component(root, ComponentType.APPLICATION)
    bom = Bom()
    bom.metadata.component = main
    bom.metadata.timestamp = datetime.fromtimestamp(made_at_s, UTC)
    bom.metadata.properties.add(Property(name="edge-agent:architecture", value=arch))
    components = [(root.name, main)]
    for wheel in wheels:
        component = _component(wheel, ComponentType.LIBRARY)
        bom.components.add(component)
        components.append((wheel.name, component))
    for name, component in components:
        targets = [other for other_name, other in components if other_name in depends.get(name, set())]
        bom.register_dependency(component, targets)
    digests = "".join(sorted(wheel.sha256 for wheel in (root, *wheels)))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_OID, digests)
    text = str(JsonV1Dot6(bom).output_as_string(indent=1))
    from cyclonedx.validation.json import JsonStrictValidator  # takes seconds to import: it compiles grammars

    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the SBOM is not CycloneDX 1.6: {error}")
    return text


def _component(wheel: Wheel, kind: ComponentType) -> Component:
    # The file is named, too: one version has a wheel for each Python.
    component = Component(
        name=wheel.name,
        version=wheel.version,
        type=kind,
        bom_ref=wheel.path.name,
        purl=PackageURL(
            "pypi", name=wheel.name, version=wheel.version, qualifiers={"file_name": wheel.path.name}
        ),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
    )
    if wheel.license:
        component.licenses.add(_license(wheel.license))
    return component


def _license(text: str) -> License:
    first = text.strip().splitlines()[0][:_MAX_LICENSE_CHARACTERS]
    return LicenseFactory().make_from_string(first, license_acknowledgement=LicenseAcknowledgement.DECLARED)
