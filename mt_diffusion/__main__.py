"""python -m mt_diffusion"""

from mt_diffusion.console import main

if __name__ == "__main__":
    main()
