"""`accelerate launch -m diffdistill.train recipe=NAME [key=value ...]`: train one student."""

from __future__ import annotations

import sys
import traceback


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 (the user's mistake, one line) or 1 (ours, with trace)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from diffdistill.config import compose
        from diffdistill.run import execute

        cfg, provenance = compose(argv)
        execute(cfg, provenance, argv=argv)
    except ValueError as error:
        print(f"diffdistill: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
