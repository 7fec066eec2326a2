import torch
from accelerate import Accelerator
from mine import build_data, build_model
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

EPOCHS = 10
accelerator = Accelerator()
torch.manual_seed(0)
data, model = build_data(), build_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
per_process = 256 // accelerator.num_processes
loader = DataLoader(data.train, batch_size=per_process, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=EPOCHS * len(loader), three_phase=True)
for _ in range(EPOCHS):
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
if accelerator.is_main_process:
    images, labels = (each.to(accelerator.device) for each in data.evaluation.tensors)
    with torch.no_grad():
        net = accelerator.unwrap_model(model)
        print("accuracy", (net(images).argmax(1) == labels).float().mean().item())
accelerator.end_training()
