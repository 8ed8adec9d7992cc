# Sourced by the run.sh of the questions that are asked on CIFAR-10: the two small models, and how their runs are measured.
#   vit, resnet    the flags of a ViT of width 128 with patches of 4, and of a ResNet-18 with the small stem, 32 pixels
#   measure DIR    k-NN, a linear probe and an attentive one of the run in DIR, as JSON files in it
# The probes see the images as they are, so that the frozen backbone runs once; PROBE_EPOCHS (default 30) is their length.

vit=(--arch vit_small --patch_size 4 --embed_dim 128 --depth 6 --num_heads 4 --img_size 32 --recipe cifar)
resnet=(--arch resnet18 --stem small --img_size 32 --recipe cifar)

measure() {
    local common=(--pretrained_weights "$1/checkpoint.pth" --data_path "$data" "${subset[@]}" --output_dir "$1")
    local epochs=${PROBE_EPOCHS:-30}
    "${launch[@]}" eval_knn.py "${common[@]}" &&
        "${launch[@]}" eval_linear.py "${common[@]}" --probes linear ep --augment false --epochs "$epochs" --val_freq "$epochs"
}
