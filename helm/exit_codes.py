"""What Kubernetes does about each exit code: from the table in jobs/errors.py to a podFailurePolicy."""

from __future__ import annotations

from typing import Any, Literal

from jobs import errors
from jobs.errors import LorajobError

Action = Literal["FailJob", "Ignore", "Count"]

# FailJob: another try would end the same. Count: it may go well the next time, as often as
# backoffLimit says. Ignore: nothing failed, start it again.
ACTIONS: dict[type[LorajobError], Action] = {
    errors.LorajobError: "Count",
    errors.SpecError: "FailJob",
    errors.DataError: "FailJob",
    errors.AccessError: "FailJob",
    errors.DoesNotFitError: "FailJob",
    errors.VerificationError: "FailJob",
    errors.ServiceError: "Count",
    errors.Preempted: "Ignore",
}
SAID = {
    "FailJob": "the Job fails at once",
    "Count": "tried again, and counted against `job.backoffLimit`",
    "Ignore": "tried again, not counted",
}


def table() -> dict[int, Action]:
    """The action for each exit code there is. Raises LookupError for an error without one."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, LorajobError)
    ]
    if missing := [kind.__name__ for kind in kinds if kind not in ACTIONS]:
        raise LookupError(
            f"jobs/errors.py has {', '.join(missing)}: say in helm/exit_codes.py what Kubernetes does"
        )
    found: dict[int, Action] = {}
    for kind in kinds:
        if found.setdefault(kind.exit_code, ACTIONS[kind]) != ACTIONS[kind]:
            raise LookupError(f"exit code {kind.exit_code} has two actions in helm/exit_codes.py")
    return dict(sorted(found.items()))


def pod_failure_policy(container: str) -> dict[str, Any]:
    """The Job's podFailurePolicy; the first rule that fits a pod decides."""
    rules: list[dict[str, Any]] = [
        # A drained node or a preempting pod: whatever the code, the run is not to blame.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]
    codes = table()
    for action in ("Ignore", "FailJob"):
        values = [code for code, its in codes.items() if its == action]
        rules.append(
            {
                "action": action,
                "onExitCodes": {"containerName": container, "operator": "In", "values": values},
            }
        )
    return {"rules": rules}
