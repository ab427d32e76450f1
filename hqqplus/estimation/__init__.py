"""What a recipe will take, before anything is downloaded: memory by part, cards that it fits on, disk, time.

    from hqqplus.estimation.estimate import estimate
    found = estimate(load_recipe("recipes/llama3_8b_1bit.yaml"), configuration="config.json")

There are no formulas for families of models in here. The model is built from its configuration without memory
(`bare.py`), packed as the recipe says, and one step of what the recipe does is run on tensors without data
(`simulation.py`), by the same code that will run it.
"""
