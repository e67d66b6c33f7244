"""``python -m services.agent``: the options of every process, and the children to run."""

import sys

from common.process_args import process_args, process_parser
from common.service_runner import run_service
from services.agent.service import serve


def main() -> int:
    parser = process_parser("agent")
    parser.add_argument("--child", action="append", required=True, metavar="KIND-N", help="may be given several times")
    parser.add_argument("--stop-at-eof", action="store_true", help="stop in order when standard input ends")
    options = parser.parse_args()
    args = process_args("agent", options)
    return run_service(args.name, lambda stop: serve(args, options.child, options.stop_at_eof, stop))


if __name__ == "__main__":
    sys.exit(main())
