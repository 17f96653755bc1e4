"""ResNet-20 on CIFAR-10."""

from benchmarks.headline.cifar_resnet import CifarResNet


class Plugin(CifarResNet):
    name = "resnet20"
    title = "ResNet-20, CIFAR-10"
    # 17.4, 13.5 and 9.0 MMAC are those of claim A2.
    budgets = ("macs=50%", "macs=17.4M", "macs=13.5M", "macs=25%", "macs=9M", "bytes=25%", "bytes=10%")
