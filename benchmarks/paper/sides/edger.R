# edgeR of one side against the other, as the paper ran it but without zinbwave's weights, which are 1 there:
#   Rscript edger.R COUNTS.csv SIDE.csv OUT.csv      genes x cells; 1 or 2 for each cell
suppressMessages(library(edgeR))
files <- commandArgs(trailingOnly = TRUE)
counts <- as.matrix(read.csv(files[1], header = FALSE))
side <- factor(scan(files[2], quiet = TRUE), levels = c(2, 1))
design <- model.matrix(~side)
dge <- calcNormFactors(DGEList(counts = counts))
fit <- glmFit(estimateDisp(dge, design), design)
found <- glmLRT(fit, coef = 2)$table
write.csv(found[, c("logFC", "PValue")], files[3], row.names = FALSE)
cat(as.character(packageVersion("edgeR")))
