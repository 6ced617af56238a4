"""``python -m efficientformer`` is the command ``efficientformer``."""

from efficientformer.cli.app import main

main()
