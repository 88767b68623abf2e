"""The chart's values: which there are and of which type.

What each means stands above it in helm/lorajob/values.yaml, and so does its default;
`helm.generate` makes the schema and the README of both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
NameOrNone = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
LabelValue = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)
]
QUALIFIED = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
QualifiedName = Annotated[str, Field(pattern=f"^{QUALIFIED}$", max_length=317)]
QualifiedNameOrNone = Annotated[str, Field(pattern=f"^({QUALIFIED})?$", max_length=317)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Key = Annotated[str, Field(pattern=r"^[-._A-Za-z0-9]+$")]
Path = Annotated[str, Field(pattern=r"^/[^:]*$")]
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"
Quantity = Annotated[str, Field(pattern=f"^{QUANTITY}$")]
QuantityOrNone = Annotated[str, Field(pattern=f"^({QUANTITY})?$")]
Gi = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Group = Annotated[int, Field(ge=-1, le=2**31 - 1)]
# Not root, who is 0.
User = Annotated[int, Field(ge=-1, le=2**31 - 1, json_schema_extra={"not": {"const": 0}})]
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
AccessModes = Annotated[
    list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]], Field(min_length=1)
]


def left_out() -> Any:
    """For one of several fields, each of which excludes the others."""
    return Field(default=None)


class Item(BaseModel):
    """What a user adds: fields may be left out."""

    model_config = ConfigDict(extra="forbid")


class Section(Item):
    """What stands in values.yaml: every field is there."""


class Image(Section):
    repository: Annotated[str, Field(pattern=r"^[a-z0-9][-a-z0-9._/:]*[a-z0-9]$")]
    tag: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][-A-Za-z0-9._]{0,127})?$")]
    variant: Literal["", "cpu"]
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
    pullPolicy: Literal["IfNotPresent", "Always", "Never"]
    pullSecrets: list[Name]


class GpuClaim(Item):
    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["template"]}, {"required": ["claim"]}]}
    )
    name: Label
    template: Name = ""
    claim: Name = ""
    request: Label = ""


class Gpu(Section):
    count: Annotated[int, Field(ge=0)]
    resource: QualifiedName
    products: list[LabelValue]
    minMemoryMiB: Annotated[int, Field(ge=0)]
    productLabel: QualifiedName
    memoryLabel: QualifiedName
    taint: QualifiedNameOrNone
    claims: list[GpuClaim]


class Requests(Section):
    cpu: Quantity
    memory: Quantity


class Limits(Section):
    cpu: QuantityOrNone
    memory: Quantity


class Resources(Section):
    requests: Requests
    limits: Limits


class Claim(Section):
    sizeGi: Gi
    storageClass: NameOrNone
    accessModes: AccessModes
    existingClaim: NameOrNone
    keep: bool


class Work(Claim):
    kind: Literal["claim", "ephemeral", "emptyDir"]


class Cache(Claim):
    create: bool


class Sized(Section):
    sizeGi: Gi


class EnvSecret(Item):
    secret: Name
    optional: bool = False


class KeySecret(Item):
    env: Variable
    secret: Name
    key: Key
    optional: bool = False


class Credentials(Section):
    env: list[EnvSecret]
    keys: list[KeySecret]


class ServiceAccount(Section):
    create: bool
    name: NameOrNone
    annotations: dict[QualifiedName, str]


class Job(Section):
    backoffLimit: Annotated[int, Field(ge=0)]
    deadlineSeconds: Annotated[int, Field(ge=0)]
    ttlSeconds: Annotated[int, Field(ge=-1)]
    suspend: bool


class Kueue(Section):
    queue: NameOrNone
    priorityClass: NameOrNone


class Toleration(Item):
    key: QualifiedName = ""
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    tolerationSeconds: Annotated[int, Field(ge=0)] = 0


class Scheduling(Section):
    priorityClassName: NameOrNone
    runtimeClassName: NameOrNone
    nodeSelector: dict[QualifiedName, LabelValue]
    tolerations: list[Toleration]


class Security(Section):
    uid: User
    gid: Group
    fsGroup: Group


class Places(Item):
    cidr: Cidr
    except_: Annotated[list[Cidr], Field(alias="except")] = []
    ports: list[Port] = []


class Network(Section):
    policy: bool
    dns: bool
    ports: list[Port]
    places: list[Places]


class Metrics(Section):
    annotate: bool


class KeyOf(Item):
    name: Name
    key: Key
    optional: bool = False


class FieldOf(Item):
    fieldPath: str
    apiVersion: Literal["v1"] = "v1"


class ValueFrom(Item):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    configMapKeyRef: KeyOf = left_out()
    secretKeyRef: KeyOf = left_out()
    fieldRef: FieldOf = left_out()


class Env(Item):
    model_config = ConfigDict(json_schema_extra={"minProperties": 2, "maxProperties": 2})
    name: Variable
    value: str = ""
    valueFrom: ValueFrom = left_out()


class FileOf(Item):
    key: Key
    path: str
    mode: int = 0


class ConfigMapVolume(Item):
    name: Name
    items: list[FileOf] = []
    defaultMode: int = 0
    optional: bool = False


class SecretVolume(Item):
    secretName: Name
    items: list[FileOf] = []
    defaultMode: int = 0
    optional: bool = False


class ClaimVolume(Item):
    claimName: Name
    readOnly: bool = False


class EmptyDirVolume(Item):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity = ""


class CsiVolume(Item):
    driver: str
    readOnly: bool = False
    fsType: str = ""
    volumeAttributes: dict[str, str] = {}


class Named(Item):
    name: Name
    items: list[FileOf] = []
    optional: bool = False


class TokenOf(Item):
    path: str
    audience: str = ""
    expirationSeconds: Annotated[int, Field(ge=600)] = 3600


class ProjectedSource(Item):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    configMap: Named = left_out()
    secret: Named = left_out()
    serviceAccountToken: TokenOf = left_out()


class ProjectedVolume(Item):
    sources: list[ProjectedSource]
    defaultMode: int = 0


class Volume(Item):
    model_config = ConfigDict(json_schema_extra={"minProperties": 2, "maxProperties": 2})
    name: Label
    configMap: ConfigMapVolume = left_out()
    secret: SecretVolume = left_out()
    persistentVolumeClaim: ClaimVolume = left_out()
    emptyDir: EmptyDirVolume = left_out()
    projected: ProjectedVolume = left_out()
    csi: CsiVolume = left_out()


class Mount(Item):
    name: Label
    mountPath: Path
    readOnly: bool = False
    subPath: str = ""


class Extra(Section):
    env: list[Env]
    volumes: list[Volume]
    mounts: list[Mount]
    labels: dict[QualifiedName, LabelValue]
    annotations: dict[QualifiedName, str]
    podAnnotations: dict[QualifiedName, str]


class Values(Section):
    spec: JsonValue
    image: Image
    gpu: Gpu
    resources: Resources
    work: Work
    cache: Cache
    tmp: Sized
    sharedMemory: Sized
    credentials: Credentials
    serviceAccount: ServiceAccount
    job: Job
    kueue: Kueue
    scheduling: Scheduling
    security: Security
    network: Network
    metrics: Metrics
    extra: Extra


def schema() -> dict[str, Any]:
    """The values' own JSON schema, without descriptions; that of the spec is not in it."""
    found = Values.model_json_schema()
    found["$defs"] = {name: _bare(part) for name, part in found["$defs"].items()}
    return _bare(found)


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    """A schema without what says nothing: titles made of names, and defaults that nobody fills in."""
    properties = {
        name: {key: value for key, value in field.items() if key not in ("title", "default")}
        for name, field in part.get("properties", {}).items()
    }
    for field in properties.values():
        if "patternProperties" in field:  # a map: no key but those of the pattern
            field["additionalProperties"] = False
    kept = {key: value for key, value in part.items() if key not in ("title", "description")}
    return {**kept, "properties": properties}
