import torch
import torch.distributed as dist
from mine import build_data, build_model
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler

EPOCHS = 10
dist.init_process_group("gloo")  # "nccl" on GPUs, with .to(device) below
torch.manual_seed(0)
data = build_data()
model = DistributedDataParallel(build_model())
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
sampler = DistributedSampler(data.train)
loader = DataLoader(data.train, batch_size=256 // dist.get_world_size(), sampler=sampler)
scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=EPOCHS * len(loader), three_phase=True)
for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
if dist.get_rank() == 0:
    images, labels = data.evaluation.tensors
    with torch.no_grad():
        print("accuracy", (model.module(images).argmax(1) == labels).float().mean().item())
dist.destroy_process_group()
