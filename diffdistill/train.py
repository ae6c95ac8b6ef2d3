"""`accelerate launch -m diffdistill.train recipe=NAME [key=value ...]`: train one student."""

from __future__ import annotations

import sys

from diffdistill.errors import guarded


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 (the user's mistake, one line) or 1 (ours, with trace)."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        from diffdistill import cli

        return cli.main(["train", "--help"])
    return guarded(lambda: _train(argv))


def _train(argv: list[str]) -> None:
    from diffdistill.config import compose
    from diffdistill.run import execute

    cfg, provenance = compose(argv)
    execute(cfg, provenance, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
