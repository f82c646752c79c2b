"""What the experiment is made of: metrics, SyncNet, compared systems, tables, figures, listening test.

[1] Liang et al.: TalkingFlow (the paper) [2] Chung, Zisserman: Out of time: automated lip sync in the wild,
2016 [3] Eskimez et al.: Generating talking face landmarks, arXiv 1803.09803; eeskimez/Talking-Face-Landmarks
[4] Chen et al.: Hierarchical cross-modal talking face generation (ATNet), arXiv 1905.03820;
lelechen63/ATVGnet [5] Ji et al.: Audio-driven emotional video portraits (EVP), arXiv 2104.07452; jixinya/EVP
[6] Lu, Chai, Cao: Live Speech Portraits, ACM TOG 40(6), 2021; YuanxunLu/LiveSpeechPortraits [7] Gneiting,
Raftery: Strictly proper scoring rules, prediction, and estimation, JASA 102, 2007 [8] Soukupova, Cech:
Real-time eye blink detection using facial landmarks, CVWW 2016 [9] Yuan, Kitani: DLow: diversifying latent
flows for diverse human motion prediction, ECCV 2020 [10] Heusel et al.: GANs trained by a two time-scale
update rule converge to a local Nash equilibrium, NeurIPS 2017"""
