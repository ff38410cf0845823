"""python -m rmjax.export."""

from rmjax.export.write import main

main()
