"""python -m lowbit"""

from .cli import main

main()
