"""The hybrid feedback loop: people's labels start the training, and the trained model makes labels for more of it.

    for round in rounds:
        collect   answers of the current policy                         (a stage)
        score     by the ensemble and a judge; pairs                     (a stage)
        route     people's budget: audit, recheck, disagreement, uncertainty
        label     people, on a page; or simulated ones
        merge     people's votes, and machine labels that pass the gate
        reward    an ensemble from the base, on all rounds' labels       (a stage)
        heldout   a reward model on labels that PPO never sees           (a stage)
        ppo       from the current policy, paid what the ensemble agrees on (a stage)
        evaluate  on prompts that are never trained on                   (a stage)
        vote      people compare this round's answers with others', blind; no label of it trains
        decide    alarms, which policy to keep, whether to go on

A step that is done is in the store and never done again; one that was cut off is done again, to the same end.
"""
