"""Run the command line: `python -m nanovllm`."""

import sys

from nanovllm.cli.main import main

sys.exit(main())
