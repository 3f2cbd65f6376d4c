//! Cost measurements: what training and scoring cost, TALLRec against CoLLM.
