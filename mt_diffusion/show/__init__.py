"""x"""


def main(argv: list[str]) -> None:
    import argparse

    argparse.ArgumentParser().parse_args(argv)
