"""The command line: `lorajob run|check|export|chat|...`. Imports only what a command needs.

The one place where an error becomes a message and an exit code.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import __version__, stop
from jobs import arguments as texts
from jobs.completion import SHELLS
from jobs.errors import AccessError, LorajobError, Preempted
from jobs.observe.termination import outcome_of, write_termination
from jobs.reached import Reached
from jobs.secrets import guard_process, redact, redact_tree

if TYPE_CHECKING:
    from jobs.observe.events import Observer
    from jobs.run import Outcome
    from jobs.spec import Spec


def main(argv: list[str] | None = None) -> int:
    """The exit code. Without `argv` this is the process's own command line, and it is guarded:
    what any library prints shows no secret either."""
    if argv is None:
        guard_process()
    code = _main(sys.argv[1:] if argv is None else argv)
    if argv is None and stop.asked():
        _end_children()
        # Threads that wait for a server would be waited for, longer than there is time.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: list[str]) -> int:
    try:
        _require_command_or_file(argv)
        arguments = _parser().parse_args(_with_command(argv))
        code: int = arguments.do(arguments)
        sys.stdout.flush()
        return code
    except LorajobError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print(
            "\nlorajob: stopped; start it again to go on after the last finished stage",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            return 1
        return _bug(error)


def _output_is_gone() -> bool:
    """Whether whoever read our output has left; the rest of it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    if gone:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _bug(error: Exception) -> int:
    """What nobody foresaw: one line that says so, and the traceback for whoever mends it."""
    print(
        redact(f"lorajob: this is a bug in lorajob: {_summary(error)}\n")
        + "  -> please report it with what follows and the spec",
        file=sys.stderr,
    )
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return LorajobError.exit_code


def _summary(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}").splitlines()[0]


def _fail(error: LorajobError) -> int:
    print(redact(f"lorajob: {error.title}\n{error}"), file=sys.stderr)
    return error.exit_code


def _with_command(argv: list[str]) -> list[str]:
    """`run` is the default: `lorajob`, `lorajob my.yaml` and `lorajob --work w` mean it."""
    known = {*COMMANDS, "-h", "--help", "--version"}
    return argv if argv and argv[0] in known else ["run", *argv]


def _require_command_or_file(argv: list[str]) -> None:
    """Raises AccessError where the first word is neither, which a mistyped command is."""
    word = argv[0] if argv else ""
    if not word or word in COMMANDS or not word.replace("-", "").replace("_", "").isalnum():
        return  # an option, or a path that is no bare word: whether it is there the spec's reader says
    if word.startswith("-") or Path(word).exists():
        return
    near = difflib.get_close_matches(word.lower(), COMMANDS, n=1)
    guess = f"did you mean `lorajob {shlex.join([near[0], *argv[1:]])}`? " if near else ""
    error = AccessError(
        f"there is no command and no file called {word}",
        f"{guess}The commands are {', '.join(COMMANDS)}; a spec is named by its path",
    )
    write_termination(outcome_of(error))
    raise error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorajob",
        allow_abbrev=False,  # an option that is cut off may mean another one some day
        description=texts.MAIN,
        epilog=f"`lorajob COMMAND --help` says more of each.\n\n{texts.SPEC}\n{texts.ALL_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lorajob {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    subs = {}
    for name, (do, text, more) in COMMANDS.items():
        subs[name] = commands.add_parser(
            name, allow_abbrev=False, help=text.partition("\n")[0], description=text, epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        subs[name].set_defaults(do=do)
    texts.add_export_arguments(subs["export"])
    texts.add_chat_arguments(subs["chat"])
    texts.add_report_argument(subs["report"])
    for name in ("run", "check"):
        texts.add_spec_argument(subs[name])
    for name in ("run", "check", "export"):
        texts.add_work_argument(subs[name])
    for name in ("run", "export", "tools"):
        texts.add_log_argument(subs[name])
    texts.add_check_arguments(subs["check"])
    subs["completion"].add_argument("shell", choices=SHELLS, help="the shell it is for")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """The whole job; however it ends, the termination message says so."""
    reached = Reached()
    try:
        try:
            stop.install(lambda: reached.grace, lambda: _end_now(reached))
            with stop.recognized():
                _job(arguments, reached)
        except stop.Stop:
            raise _stopped(reached) from None
    except BaseException as error:
        stop.over()
        write_termination(outcome_of(error, **reached.fields()))
        raise
    write_termination(outcome_of(**reached.fields()))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """The same with an adapter that is there in the place of the training."""
    return _run(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from jobs.chat import chat

    return chat(arguments)


def _stopped(reached: Reached) -> LorajobError:
    """What a run that was told to stop ends with."""
    reason = stop.reason()
    if reason:
        return reason
    name = signal.Signals(stop.signal_number()).name
    where = f" in the stage {reached.stage}" if reached.stage else ""
    at = f" at step {reached.step}" if reached.step and reached.stage == "train" else ""
    safe = reached.safe()
    if safe:
        return Preempted(
            f"stopped by {name}{where}{at}; safe: {safe}", "start the same run again to go on there"
        )
    error = Preempted(
        f"stopped by {name}{where}{at}, before there was anything to keep", "start it again"
    )
    error.exit_code = 128 + stop.signal_number()  # as a shell counts it; 20 is a promise
    return error


def _end_now(reached: Reached) -> None:
    """The grace period is nearly over, and something would not end: leave with what is safe."""
    error = _stopped(reached)
    write_termination(outcome_of(error, **reached.fields()))
    _fail(error)
    _end_children()
    sys.stderr.flush()
    os._exit(error.exit_code)


def _end_children() -> None:
    """A stop may come at the moment when a process was just started and nobody knows of it yet."""
    from jobs.observe.stall import kill_children

    kill_children()


def _job(arguments: argparse.Namespace, reached: Reached) -> None:
    from jobs.startup import require_container

    require_container(arguments.work)
    given: Path | None = None
    warnings: tuple[str, ...] = ()
    if arguments.do is _export:
        from jobs.export_command import request

        asked = request(arguments)
        spec, folder, given, warnings = asked.spec, asked.folder, asked.adapter, asked.warnings
    else:
        from jobs.spec_source import load_spec

        spec = load_spec(arguments.spec)
        folder = arguments.work / spec.name
    reached.name, reached.grace = spec.name, spec.limits.grace_seconds
    from jobs.observe.events import Observer
    from jobs.run import run

    with (
        Observer(arguments.log, reached=reached) as observer,
        _stall_watch(spec, folder, observer),
    ):
        for text in warnings:
            observer.warn(text)
        try:
            with stop.recognized():
                outcome = run(spec, folder, observer, given)
        except LorajobError as error:
            observer.event(
                "run_failed", code=error.exit_code, error=error.message, what_to_do=error.hint
            )
            raise
        except stop.Stop:
            ended = _stopped(reached)
            observer.event("run_stopped", code=ended.exit_code, why=ended.message)
            raise
        except BrokenPipeError:
            raise  # there may be nobody left to tell
        except Exception as error:
            observer.event(
                "run_failed",
                code=LorajobError.exit_code,
                error=f"this is a bug in lorajob: {_summary(error)}",
                traceback="".join(traceback.format_exception(error)),
            )
            raise
    if observer.console:
        from jobs.observe.answers_table import answers_table

        answers = redact_tree(outcome.contents["stages"]["verify"]["result"])
        observer.console.print(answers_table(answers))
        lines = _ending(outcome, spec, folder, exported=given is not None)
        observer.console.print(redact("\n".join(lines)), soft_wrap=True)


def _ending(outcome: Outcome, spec: Spec, folder: Path, exported: bool) -> list[str]:
    """Where everything is, and what to do with it; as rich's markup."""
    from rich.markup import escape

    places = [t if isinstance(t, str) else f"hub://{t.hub}" for t in spec.publish]
    contents, here = outcome.contents, outcome.here
    lines = [f"everything is in [bold]{escape(str(folder))}[/bold]", *_where(contents)]
    lines = lines if here else ["everything is where it was published before"]
    lines += [f"published to [bold]{escape(place)}[/bold]" for place in places]
    if exported and not places:
        lines.append("nothing is published: --publish PLACE does that")
    local = [folder] if here else [Path(place) for place in places if "://" not in place]
    if local:
        name = shlex.quote(str(local[0]))
        page = local[0] / "report" / "report.html"
        lines.append(escape(f"next: lorajob chat {name}; how it went is in {page}"))
    return lines


def _stall_watch(spec: Spec, folder: Path, observer: Observer) -> AbstractContextManager[object]:
    """Ends a run that makes no progress; whatever the observer hears of is progress."""
    if spec.limits.stall_minutes is None:
        return nullcontext()
    from jobs.observe.stall import StallWatch

    def tell(error: LorajobError) -> None:
        write_termination(outcome_of(error, **observer.reached.fields()))
        # Last, for what hangs may be what it has to be written to.
        observer.event(
            "run_failed", code=error.exit_code, error=error.message, what_to_do=error.hint
        )

    log = folder / "logs" / "stall.log"
    watch = StallWatch(60 * spec.limits.stall_minutes, log, tell)
    observer.beat = watch.beat
    return watch


def _where(contents: dict[str, Any]) -> list[str]:
    """One line for each folder of the run: how many files and how large."""
    folders: dict[str, list[int]] = {}
    for entry in contents["files"]:
        name, slash, _ = entry["path"].partition("/")
        folders.setdefault(name + slash, []).append(entry["size"])
    return [
        f"  {name:<10} {len(sizes):2} files {sum(sizes) / 2**20:9.1f} MiB"
        for name, sizes in folders.items()
    ]


def _check(arguments: argparse.Namespace) -> int:
    from jobs.spec_source import load_spec

    spec = load_spec(arguments.spec)
    from jobs.check import check
    from jobs.observe.events import Observer

    # What goes on is told on standard error: standard output has the findings alone.
    with Observer("auto", sys.stderr, quiet=True) as observer:
        found = check(spec, arguments.work / spec.name, arguments.rows, observer)
    if arguments.format == "json":
        print(json.dumps(redact_tree(found), ensure_ascii=False))
    else:
        from jobs.observe.check_text import print_check

        print_check(found)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from jobs.observe.report import render_report

    print(render_report(arguments.folder))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from jobs.spec import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0


def _tools(arguments: argparse.Namespace) -> int:
    from jobs.export.llama.build import ensure_tools
    from jobs.observe.events import Observer

    with Observer(arguments.log) as observer:
        folder = ensure_tools(observer)
        observer.event("tools", folder=str(folder))
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from jobs.completion import completion

    print(completion(_parser(), arguments.shell))
    return 0


# What each does, its text, and what stands below its options.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str]] = {
    "run": (_run, texts.RUN, f"{texts.SPEC}\n{texts.RUN_CODES}"),
    "check": (_check, texts.CHECK, f"{texts.SPEC}\n{texts.CHECK_CODES}"),
    "export": (_export, texts.EXPORT, texts.ALL_CODES),
    "chat": (_chat, texts.CHAT, texts.CHAT_CODES),
    "report": (_report, texts.REPORT, texts.REPORT_CODES),
    "schema": (_schema, texts.SCHEMA, ""),
    "tools": (_tools, texts.TOOLS, texts.TOOLS_CODES),
    "completion": (_completion, texts.COMPLETION, ""),
}
