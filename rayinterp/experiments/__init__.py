"""The paper's experiments: grids of explainer arms over one run directory, and the figures that come of them.

    design    which arms an experiment adds to a config, and what it needs of it
    results   scores, complexity, explanations -> panels of means with intervals, and the table `experiments`
    figures   panels -> PNG, SVG, PDF
    page      panels -> a page of the report, with the features behind every number
    runner    all of it in order

All arms of an experiment go through one explain stage, whose actors keep LLM and simulator busy with whatever feature
of whatever arm is next: a process for each point of the grid would share nothing and wait alone. An arm of two
experiments is one arm, under one name, so that the second pays for what is new.
"""
