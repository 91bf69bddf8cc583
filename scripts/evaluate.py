"""accelerate launch scripts/evaluate.py RECIPE [a.b=value ...]: the evaluate stage, with any accelerate config."""

from align.entry import main

if __name__ == "__main__":
    main("evaluate")
