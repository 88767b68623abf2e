"""The chart's README.md: how it is used, and every value from its comment in values.yaml."""

from __future__ import annotations

import json

from helm.documented import Value, documented
from helm.exit_codes import SAID, table
from helm.sizes import EXPORTS, sizes
from jobs import __version__, errors
from jobs.errors import LorajobError
from jobs.preflight import GGUF_BITS

HEAD = """\
# The chart

<!-- Written by `make charts`: edit helm/readme.py or values.yaml. -->

One release is one run of lorajob: a Job, its spec in a ConfigMap, a service account, and a claim for
the run's folder. Kubernetes 1.29 or newer.

```yaml
# my-run.yaml
spec:                       # the run spec, as in a spec file
  name: support-bot
  model: {base: unsloth/Llama-3.2-1B-Instruct}
  data: {train: "hf://mlabonne/FineTome-100k", eval: 0.02}
  export: {gguf: [q4_k_m]}
  publish: ["s3://models/support-bot"]
credentials:
  env: [{secret: aws}]      # with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
```

```
helm install support-bot helm/lorajob -f my-run.yaml     # the notes say how to watch and fetch
helm template support-bot helm/lorajob -f my-run.yaml --no-hooks | kubectl create -f -
```

- **A mistake never reaches the cluster**: values and spec have a schema that knows every field at every
  depth, so a typo is refused with the place where it stands; so is a secret among the values, a name
  given twice, and a run that would leave nothing behind.
- **Check first**: `helm install ... --set job.suspend=true`, then `helm test support-bot --logs` runs
  `lorajob check` in the cluster, with the run's volumes, credentials and network and without a GPU;
  `helm upgrade ... --reuse-values --set job.suspend=false` starts the run.
- **Another spec is another run**: the Job's name ends in a hash of the spec and of everything else that
  a Job cannot change. An upgrade that changes one of them makes a new Job in place of the old, which is
  told to stop and leaves a checkpoint; one that changes `job` or `extra.annotations` alone leaves it be.
- **Pod Security `restricted`** is met by every rendering: not root, no capabilities, a read-only root,
  no token of the cluster. There is no value that changes it.
- **Results** stay on the claim (`work.keep`) and go where `spec.publish` says.
"""


def readme() -> str:
    """The file's text."""
    parts = [HEAD, _codes(), _sizes(), *_values(), _image()]
    return "\n".join(parts)


def _codes() -> str:
    titles = {
        kind.exit_code: kind.title
        for kind in reversed(list(vars(errors).values()))
        if isinstance(kind, type) and issubclass(kind, LorajobError)
    }
    rows = [[str(code), titles[code], SAID[action]] for code, action in table().items()]
    return (
        "## What happens at which exit code\n\nThe Job's podFailurePolicy is made of jobs/errors.py. "
        "A pod that a disruption ended (a drained node, preemption)\nis replaced and not counted, "
        "whatever its code.\n\n" + _table(["code", "meaning", "what Kubernetes does"], rows)
    )


def _sizes() -> str:
    head, *rows = sizes()
    bits = ", ".join(f"{kind} {bits:g}" for kind, bits in GGUF_BITS.items())
    return f"""\
## How large

`lorajob check` prints what a spec takes on the disk, from the base's real size; `helm test` does so in
the cluster. `work.sizeGi` is the sum of its lines, rounded up; with a cache of its own the base and the
data are in that instead. The formula, with W for the base's 16-bit weights in bytes:

- the base: W
- checkpoints: `checkpoints.keep` + 2 of them, each trained weight with the optimizer's states; at
  least W / 10
- merged weights: W
- GGUF: W × bits / 16 for each, and W at least: they are made from a file of that size, which shrinks
  as they grow (a file system that cannot give back parts of a file, as NFS before 4.2, needs W and
  all of them): {bits}

GiB for rank 16 and all linear layers, base included:

{_table(head, rows, right=len(EXPORTS))}"""


def _values() -> list[str]:
    """A table for each section of values.yaml."""
    found = documented()
    parts = ["## Values\n"]
    for section in (value for value in found if "." not in value.path):
        parts.append(f"### `{section.path}`\n\n{section.text}\n")
        inner = [v for v in found if v.path.startswith(f"{section.path}.") and not v.is_section]
        if inner:
            rows = [[f"`{v.path}`", _shown(v), v.text] for v in inner]
            parts.append(_table(["value", "default", "meaning"], rows))
    return parts


def _shown(value: Value) -> str:
    return f"`{json.dumps(value.default)}`"


def _image() -> str:
    return f"""\
## What the image must be

The repository's Dockerfile makes it: `docker build -t lorajob:{__version__} .`, and with
`--build-arg VARIANT=cpu --build-arg BASE_IMAGE=debian:bookworm-slim` `lorajob:{__version__}-cpu`. Push it to
where the cluster pulls from, and set `image.repository`; the tag is the chart's appVersion. It runs as
user 1000 and writes to `/work`, `/cache` and `/tmp` alone, which are the volumes here.
"""


def _table(head: list[str], rows: list[list[str]], right: int = 0) -> str:
    lines = ["---"] * (len(head) - right) + ["---:"] * right
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, lines, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"
